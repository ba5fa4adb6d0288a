// s3sig.go: Signature Version 4 for S3, as the S3 API reference describes it in
// "Authenticating Requests (AWS Signature Version 4)". It signs headers only and
// reads no clock: the caller passes the time.

package main

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"
)

// emptySHA256 is the SHA-256 of no bytes. Every request without a body signs it.
const emptySHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"

// signRequest sets X-Amz-Date, X-Amz-Content-Sha256 and Authorization of req,
// whose URL must have a RawPath made by uriEncode and a RawQuery made by
// encodeQuery. bodySHA256 is the hash of the body in hex; the body itself is not
// read. Every header that is set is signed, except those that a proxy on the way
// may change.
func (c *s3Client) signRequest(req *http.Request, region, bodySHA256 string, at time.Time) {
	date := at.UTC().Format("20060102T150405Z")
	req.Header.Set("X-Amz-Date", date)
	req.Header.Set("X-Amz-Content-Sha256", bodySHA256)
	canonical, signedHeaders := canonicalRequest(req, bodySHA256)
	scope := date[:8] + "/" + region + "/s3/aws4_request"
	signature := hmacSHA256(c.signingKey(scope), "AWS4-HMAC-SHA256\n"+date+"\n"+scope+"\n"+sha256Hex([]byte(canonical)))
	req.Header.Set("Authorization", "AWS4-HMAC-SHA256 Credential="+c.cfg.accessKey+"/"+scope+
		",SignedHeaders="+signedHeaders+",Signature="+hex.EncodeToString(signature))
}

// signingKey is the key for the requests of one day to one region.
type signingKey struct {
	scope string
	key   []byte
}

// signingKey returns the key of a scope DATE/REGION/s3/aws4_request: the four parts hashed
// into the secret key one after the other.
func (c *s3Client) signingKey(scope string) []byte {
	if last := c.key.Load(); last != nil && last.scope == scope {
		return last.key
	}
	key := []byte("AWS4" + c.cfg.secretKey)
	for part := range strings.SplitSeq(scope, "/") {
		key = hmacSHA256(key, part)
	}
	c.key.Store(&signingKey{scope, key})
	return key
}

// canonicalRequest returns the text that is hashed and signed (method, path,
// query, headers sorted by name, their names, hash of the body) and the names of
// the signed headers, joined by semicolons.
func canonicalRequest(req *http.Request, bodySHA256 string) (canonical, signedHeaders string) {
	headers := append(make([][2]string, 0, 16), [2]string{"host", req.URL.Host})
	for name, values := range req.Header {
		switch name {
		case "Authorization", "Accept-Encoding", "User-Agent", "Expect", "Connection":
			continue
		}
		value := strings.Join(strings.Fields(strings.Join(values, ",")), " ")
		headers = append(headers, [2]string{strings.ToLower(name), value})
	}
	slices.SortFunc(headers, func(a, b [2]string) int { return strings.Compare(a[0], b[0]) })
	text := append(make([]string, 0, 64), req.Method, "\n", req.URL.EscapedPath(), "\n", req.URL.RawQuery, "\n")
	names := make([]string, 0, 16)
	for _, h := range headers {
		text = append(text, h[0], ":", h[1], "\n")
		names = append(names, h[0])
	}
	signedHeaders = strings.Join(names, ";")
	text = append(text, "\n", signedHeaders, "\n", bodySHA256)
	return strings.Join(text, ""), signedHeaders
}

// encodeQuery returns q in canonical form, sorted by name. Each name is one of
// the S3 API's, in ASCII, and has one value.
func encodeQuery(q url.Values) string { return strings.ReplaceAll(q.Encode(), "+", "%20") }

// uriEncode escapes every byte except A-Za-z0-9-._~ and, if s is a path, the
// slash. A server computes the signature from this spelling, so another one is
// refused; url.PathEscape would leave more bytes as they are.
func uriEncode(s string, path bool) string {
	s = strings.ReplaceAll(url.QueryEscape(s), "+", "%20") // a plus sign is %2B here
	if path {
		s = strings.ReplaceAll(s, "%2F", "/")
	}
	return s
}

// sha256Hex returns the SHA-256 of b in lower-case hex.
func sha256Hex(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// hmacSHA256 returns the HMAC of s, 32 bytes.
func hmacSHA256(key []byte, s string) []byte {
	h := hmac.New(sha256.New, key)
	h.Write([]byte(s))
	return h.Sum(nil)
}
