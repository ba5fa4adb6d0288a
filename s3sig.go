// s3sig.go: Signature Version 4 for S3, as the S3 API reference describes it in
// "Authenticating Requests (AWS Signature Version 4)". It signs headers only and
// reads no clock: the caller passes the time.

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

// emptySHA256 is the SHA-256 of no bytes. Every request without a body signs it.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// s3SigningKey is a signing key. It is valid for one day (in UTC, as 20060102)
// and one region, and is not changed once it is made.
type s3SigningKey struct {
	day, region string
	key         []byte
}

// signingKey returns the key for a region and the day of at. The client keeps
// the last key, because deriving one costs four of the five HMACs of a signature.
// Two goroutines may derive the same key at midnight, which does no harm.
func (c *s3Client) signingKey(region string, at time.Time) *s3SigningKey {
	day := at.UTC().Format("20060102")
	if k := c.cachedKey.Load(); k != nil && k.day == day && k.region == region {
		return k
	}
	k := deriveSigningKey(c.cfg.secretKey, day, region)
	c.cachedKey.Store(k)
	return k
}

// deriveSigningKey makes the signing key of a secret access key.
func deriveSigningKey(secret, day, region string) *s3SigningKey {
	key := []byte("AWS4" + secret)
	for _, s := range []string{day, region, "s3", "aws4_request"} {
		key = hmacSHA256(key, s)
	}
	return &s3SigningKey{day: day, region: region, key: key}
}

// signRequest sets X-Amz-Date, X-Amz-Content-Sha256 and Authorization of req,
// whose URL must have a RawPath made by uriEncode and a RawQuery made by
// encodeQuery. bodySHA256 is the hash of the body in hex; the body itself is not
// read. Every header that is set is signed, except those that a proxy on the way
// may change.
func (k *s3SigningKey) signRequest(req *http.Request, accessKey, bodySHA256 string, at time.Time) {
	date := at.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", date)
	req.Header.Set("X-Amz-Content-Sha256", bodySHA256)
	canonical, signedHeaders := canonicalRequest(req, bodySHA256)
	scope := k.day + "/" + k.region + "/s3/aws4_request"
	signature := hmacSHA256(k.key, "AWS4-HMAC-SHA256\n"+date+"\n"+scope+"\n"+sha256Hex(canonical))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+accessKey+"/"+scope+
		",SignedHeaders="+signedHeaders+",Signature="+hex.EncodeToString(signature))
}

// canonicalRequest returns the text that is hashed and signed (method, path,
// query, headers sorted by name, their names, hash of the body) and the names of
// the signed headers, joined by semicolons.
func canonicalRequest(req *http.Request, bodySHA256 string) (canonical []byte, signedHeaders string) {
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
	return append(append(b, '\n'), bodySHA256...), string(names)
}

// headerName returns the name in a line "name:value".
func headerName(line string) string {
	name, _, _ := strings.Cut(line, ":")
	return name
}

// encodeQuery returns q in canonical form: each name with its value, sorted by
// encoded name and then by encoded value.
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

// uriEncode escapes every byte except A-Za-z0-9-._~ and, if s is a path, the
// slash. It escapes more than net/url does: a server computes the signature from
// this spelling, so another one is refused.
func uriEncode(s string, path bool) string {
	const upperHex = "0123456789ABCDEF"
	var b []byte // nil until the first byte that is escaped: most names need no copy
	for i := range len(s) {
		ch := s[i]
		switch {
		case 'a' <= ch && ch <= 'z', 'A' <= ch && ch <= 'Z', '0' <= ch && ch <= '9',
			ch == '-', ch == '.', ch == '_', ch == '~', path && ch == '/':
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

// sha256Hex returns the SHA-256 of b in lower-case hex.
func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// hmacSHA256 returns the HMAC of s, 32 bytes.
func hmacSHA256(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	io.WriteString(h, s)
	return h.Sum(nil)
}
