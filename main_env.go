// main_env.go: the environment becomes settings.

package main

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// lookup is os.LookupEnv.
type lookup = func(string) (string, bool)

// settings are what the environment says.
type settings struct {
	configPath, listen, dataDir string
	minFree                     int64       // -1: by the disk's size
	maxSize                     int64       // CACHE_MAX_SIZE; 0: none
	s3                          s3Config    // bucket "": local disk
	hotSize                     int64       // of the tier before S3; 0: none
	db                          sqlSettings // host "": embedded
	redisURL                    secret      // "": in process
	advertise                   string      // ADVERTISE_URL
	apiToken                    secret
	tlsCert, tlsKey             string
	drainDelay                  time.Duration
	logLevel                    slog.Level
	logFormat                   string // "": by what it is written to
}

// groups are variables of which the first needs the others.
var groups = [][]string{
	{"MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_BUCKET"},
	{"DBHOST", "DBUSER", "DBNAME"},
	{"TLS_CERT_FILE", "TLS_KEY_FILE"},
	{"TLS_KEY_FILE", "TLS_CERT_FILE"},
}

// parseSettings reads the environment. Its error is one line naming the first
// variable that is missing or wrong.
func parseSettings(env lookup) (*settings, error) {
	p := &envReader{env: env}
	p.groups()
	set := &settings{
		configPath: p.text("CONFIG_PATH", "remotes.yaml"),
		listen:     p.text("LISTEN_ADDR", ":8000"),
		dataDir:    p.text("DATA_DIR", "data"),
		minFree:    p.size("MIN_FREE", -1),
		maxSize:    p.size("CACHE_MAX_SIZE", 0),
		apiToken:   secret(p.text("API_TOKEN", "")),
		tlsCert:    p.text("TLS_CERT_FILE", ""),
		tlsKey:     p.text("TLS_KEY_FILE", ""),
		drainDelay: p.duration("DRAIN_DELAY", 0),
		logFormat:  p.oneOf("LOG_FORMAT", "", "text", "json"),
	}
	level := p.oneOf("LOG_LEVEL", "info", "debug", "info", "warn", "error")
	if p.err == nil {
		p.fail("LOG_LEVEL", set.logLevel.UnmarshalText([]byte(level)))
	}
	if _, port, err := net.SplitHostPort(set.listen); err != nil || port == "" {
		p.fail("LISTEN_ADDR", fmt.Errorf("%q is not an address like :8000 or 127.0.0.1:8000", set.listen))
	}
	if v := string(set.apiToken); strings.TrimSpace(v) != v || strings.ContainsAny(v, "\r\n") {
		p.fail("API_TOKEN", errors.New("holds a line break, or white space at an end: no client could send it (often the end of a file put into a variable)"))
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		v := p.text(name, "")
		if v != "" && !strings.Contains(v, "://") {
			v = "http://" + v // as net/http reads it
		}
		if v != "" && hostURL(v, "http", "https", "socks5", "socks5h") == nil {
			p.fail(name, errors.New("is not a URL like http://proxy.example:3128"))
		}
	}
	if dir, err := filepath.Abs(set.dataDir); err == nil {
		set.dataDir = dir
	}
	p.backends(set)
	return set, p.err
}

// envReader reads variables and keeps the first mistake.
type envReader struct {
	env lookup
	err error
}

func (p *envReader) fail(name string, err error) {
	if p.err == nil && err != nil {
		p.err = fmt.Errorf("environment: %s: %w", name, err)
	}
}

// text is a variable's value; empty counts as unset.
func (p *envReader) text(name, otherwise string) string {
	if v, _ := p.env(name); v != "" {
		return v
	}
	return otherwise
}

func (p *envReader) size(name string, otherwise int64) int64 {
	v := p.text(name, "")
	if v == "" {
		return otherwise
	}
	n, err := parseSize(v)
	p.fail(name, err)
	return n
}

func (p *envReader) duration(name string, otherwise time.Duration) time.Duration {
	v := p.text(name, "")
	if v == "" {
		return otherwise
	}
	d, err := time.ParseDuration(v)
	if err != nil || d < 0 {
		p.fail(name, fmt.Errorf("%q is not a duration like 10s or 1m30s", v))
	}
	return d
}

func (p *envReader) oneOf(name, otherwise string, values ...string) string {
	v := p.text(name, otherwise)
	for _, x := range append(values, otherwise) {
		if strings.EqualFold(v, x) {
			return x
		}
	}
	p.fail(name, fmt.Errorf("%q is not one of %s", v, strings.Join(values, ", ")))
	return v
}

func (p *envReader) groups() {
	for _, g := range groups {
		if p.text(g[0], "") == "" {
			continue
		}
		for _, name := range g[1:] {
			if p.text(name, "") == "" {
				p.fail(name, fmt.Errorf("is not set, but %s is: they belong together", g[0]))
			}
		}
	}
}

// backends reads the variables of S3, PostgreSQL and Redis.
func (p *envReader) backends(set *settings) {
	set.hotSize = p.size("HOT_CACHE_SIZE", 10<<30)
	p.endpoint(&set.s3)
	set.db = sqlSettings{host: p.text("DBHOST", ""), port: p.text("DBPORT", "5432"), user: p.text("DBUSER", ""), name: p.text("DBNAME", ""),
		password: secret(p.text("DBPASS", "")), sslmode: p.oneOf("DBSSLMODE", "disable", "disable", "require", "verify-ca", "verify-full")}
	if n, err := strconv.Atoi(set.db.port); err != nil || n < 1 || n > 65535 {
		p.fail("DBPORT", fmt.Errorf("%q is not a port number", set.db.port))
	}
	if h := set.db.host; h != "" && h[0] != '/' && !hostForm.MatchString(h) && net.ParseIP(h) == nil {
		p.fail("DBHOST", errors.New("is not the name or address of a host alone: the rest goes into DBPORT, DBUSER, DBPASS and DBNAME"))
	}
	set.redisURL = secret(p.text("REDIS_URL", ""))
	if v := string(set.redisURL); v != "" && hostURL(v, "redis", "rediss") == nil {
		p.fail("REDIS_URL", errors.New("is not a URL like redis://:PASSWORD@HOST:6379/0 or the same with rediss"))
	}
	set.advertise = strings.TrimSuffix(p.text("ADVERTISE_URL", ""), "/")
	if u := hostURL(set.advertise, "http", "https"); set.advertise != "" && (u == nil || u.User != nil || u.RawQuery != "") {
		p.fail("ADVERTISE_URL", errors.New("is not a URL like http://10.0.0.7:8000"))
	}
}

// hostForm is a host's name; those of containers may have underscores.
var hostForm = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// hostURL is v as a URL with a host, a port that is one if there is any, and
// one of those schemes; nil if it is none.
func hostURL(v string, schemes ...string) *url.URL {
	u, err := url.Parse(v)
	if err != nil || u.Hostname() == "" || hasBadPort(u) || u.Fragment != "" || !slices.Contains(schemes, u.Scheme) {
		return nil
	}
	return u
}

// endpoint reads the variables of S3: MINIO_ENDPOINT is host:port or a URL,
// whose scheme must not contradict MINIO_SECURE.
func (p *envReader) endpoint(c *s3Config) {
	host := p.text("MINIO_ENDPOINT", "")
	secure := p.oneOf("MINIO_SECURE", "", "true", "false", "1", "0")
	virtual := p.oneOf("MINIO_VIRTUAL_HOST", "false", "true", "false", "1", "0")
	if host == "" {
		return
	}
	*c = s3Config{bucket: p.text("MINIO_BUCKET", ""), accessKey: p.text("MINIO_ACCESS_KEY", ""), secretKey: p.text("MINIO_SECRET_KEY", ""),
		region: p.text("MINIO_REGION", "us-east-1"), secure: secure == "true" || secure == "1", virtualHost: virtual == "true" || virtual == "1"}
	for _, v := range [][2]string{{"MINIO_BUCKET", c.bucket}, {"MINIO_REGION", c.region}} {
		if !namePattern.MatchString(v[1]) {
			p.fail(v[0], fmt.Errorf("%q is none: letters, digits, '.', '_' and '-' are known", v[1]))
		}
	}
	isURL := strings.Contains(host, "://")
	if !isURL {
		host = "http://" + host
	}
	u := hostURL(host, "http", "https")
	switch {
	case u == nil || u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "":
		p.fail("MINIO_ENDPOINT", errors.New("is neither host:port nor an http or https URL of a host alone"))
		return
	case isURL && secure != "" && c.secure != (u.Scheme == "https"):
		p.fail("MINIO_SECURE", fmt.Errorf("%s contradicts the scheme %s of MINIO_ENDPOINT", secure, u.Scheme))
	case isURL:
		c.secure = u.Scheme == "https"
	}
	c.host = u.Host
}

// redisPrefix keeps caches apart that share a Redis: by their bucket, or by
// the one directory that has their files.
func (set *settings) redisPrefix() string {
	if set.s3.bucket != "" {
		return set.s3.host + "/" + set.s3.bucket
	}
	host, _ := os.Hostname() // without a name, the directory has to do
	sum := sha256.Sum256([]byte(host + ":" + set.dataDir))
	return "disk/" + hex.EncodeToString(sum[:8])
}

// reachedAt is the URL at which other replicas reach this one, given the local
// address of its connection to Redis.
func (set *settings) reachedAt(localIP string) string {
	if set.advertise != "" {
		return set.advertise
	}
	scheme := "http"
	if set.tlsCert != "" {
		scheme = "https"
	}
	_, port, _ := net.SplitHostPort(set.listen) // was parsed at the start
	return scheme + "://" + net.JoinHostPort(localIP, port)
}
