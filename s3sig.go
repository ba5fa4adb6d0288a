// s3sig.go: Signature Version 4 for S3.

package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// emptySHA256 is the hash of no bytes, which every request without a body signs.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// s3SigningKey is a signing key, good for one day and region. Deriving it costs
// four of the five HMACs of a signature.
type s3SigningKey struct {
	day, region string
	key         []byte
}

func (c *s3Client) signingKey(region string, at time.Time) *s3SigningKey {
	day := at.UTC().Format("20060102")
	if k := c.cachedKey.Load(); k != nil && k.day == day && k.region == region {
		return k
	}
	k := deriveSigningKey(c.cfg.secretKey, day, region)
	c.cachedKey.Store(k)
	return k
}

func deriveSigningKey(secret, day, region string) *s3SigningKey {
	key := []byte("AWS4" + secret)
	for _, s := range []string{day, region, "s3", "aws4_request"} {
		key = hmacSHA256(key, s)
	}
	return &s3SigningKey{day: day, region: region, key: key}
}

// signRequest adds date, payload hash and Authorization to req, whose RawPath and
// RawQuery must be what uriEncode and encodeQuery make. It signs every header
// that is set, but those that hops in between may change. The body is not read.
// (Signature Version 4, "Authenticating Requests: Using the Authorization
// Header".)
func (k *s3SigningKey) signRequest(req *http.Request, accessKey, payload string, at time.Time) {
	stamp := at.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", stamp)
	req.Header.Set("X-Amz-Content-Sha256", payload)
	canonical, signed := canonicalRequest(req, payload)
	scope := k.day + "/" + k.region + "/s3/aws4_request"
	sig := hmacSHA256(k.key, "AWS4-HMAC-SHA256\n"+stamp+"\n"+scope+"\n"+sha256Hex(canonical))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+accessKey+"/"+scope+
		",SignedHeaders="+signed+",Signature="+hex.EncodeToString(sig))
}

func canonicalRequest(req *http.Request, payload string) (canonical []byte, signed string) {
	lines := make([]string, 0, len(req.Header)+1)
	lines = append(lines, "host:"+req.URL.Host)
	for name, values := range req.Header {
		switch name {
		case "Authorization", "Accept-Encoding", "User-Agent", "Expect", "Connection":
			continue
		}
		lines = append(lines, strings.ToLower(name)+":"+strings.Join(strings.Fields(strings.Join(values, ",")), " "))
	}
	slices.SortFunc(lines, func(a, b string) int { return strings.Compare(headerName(a), headerName(b)) })
	b := make([]byte, 0, 1024)
	b = append(b, req.Method...)
	for _, part := range []string{req.URL.EscapedPath(), req.URL.RawQuery} {
		b = append(append(b, '\n'), part...)
	}
	names := make([]byte, 0, 128)
	for i, line := range lines {
		b = append(append(b, '\n'), line...)
		if i > 0 {
			names = append(names, ';')
		}
		names = append(names, headerName(line)...)
	}
	b = append(append(b, '\n', '\n'), names...)
	return append(append(b, '\n'), payload...), string(names)
}

func headerName(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return name
}

// encodeQuery is a query in canonical form: sorted by encoded name, then value.
func encodeQuery(q url.Values) string {
	pairs := make([][2]string, 0, len(q))
	for name, values := range q {
		for _, v := range values {
			pairs = append(pairs, [2]string{uriEncode(name, false), uriEncode(v, false)})
		}
	}
	slices.SortFunc(pairs, func(a, b [2]string) int { return slices.Compare(a[:], b[:]) })
	var b []byte
	for i, p := range pairs {
		if i > 0 {
			b = append(b, '&')
		}
		b = append(append(append(b, p[0]...), '='), p[1]...)
	}
	return string(b)
}

// uriEncode escapes each byte but A-Za-z0-9-._~ and, in paths, the slash. It is
// stricter than net/url, whose spelling the server would not sign.
func uriEncode(s string, path bool) string {
	const upperHex = "0123456789ABCDEF"
	var b []byte
	for i := range len(s) {
		ch := s[i]
		switch {
		case 'a' <= ch && ch <= 'z', 'A' <= ch && ch <= 'Z', '0' <= ch && ch <= '9',
			ch == '-', ch == '.', ch == '_', ch == '~', ch == '/' && path:
			if b != nil {
				b = append(b, ch)
			}
			continue
		}
		if b == nil {
			b = append(make([]byte, 0, len(s)+16), s[:i]...)
		}
		b = append(b, '%', upperHex[ch>>4], upperHex[ch&15])
	}
	if b == nil {
		return s
	}
	return string(b)
}

func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

func hmacSHA256(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, s)
	return h.Sum(nil)
}
