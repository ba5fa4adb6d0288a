// main_env.go: the environment becomes settings.

package main

import (
	"cmp"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
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

// lookupEnv looks up an environment variable, as os.LookupEnv does.
type lookupEnv = func(string) (string, bool)

// settings holds the environment variables as values that are ready to use. It
// does not change after parseSettings.
type settings struct {
	configPath, listen string
	dataDir            string      // absolute
	minFree            int64       // MIN_FREE in bytes; -1: not set, see defaultMinFree
	maxSize            int64       // CACHE_MAX_SIZE in bytes; 0: no limit
	s3                 s3Config    // bucket "": files are on the local disk
	hotSize            int64       // HOT_CACHE_SIZE in bytes; 0: no hot copies
	db                 sqlSettings // host "": the embedded index is used
	redis              *url.URL    // nil: freshness is kept in this process
	advertise          string      // ADVERTISE_URL without trailing slash; "": see openFreshness
	sealed             bool        // all remotes are
	apiToken           secret      // "": writing is off, except with a write_token
	tlsCert, tlsKey    string      // file names; "": plain HTTP
	drainDelay         time.Duration
	logLevel           slog.Level
	logFormat          string            // text or json; "": text on a terminal, else json
	shown              map[string]string // the variables as /config shows them, with their defaults
}

// groups lists variables that belong together: when one of a group is set, the
// others must be set too.
var groups = [][]string{
	{"MINIO_ENDPOINT", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "MINIO_BUCKET"},
	{"DBHOST", "DBUSER", "DBNAME"},
	{"TLS_CERT_FILE", "TLS_KEY_FILE"},
}

// parseSettings reads the environment. Its error has a line for each variable that is
// missing or wrong, and never holds the value of a secret.
func parseSettings(env lookupEnv) (*settings, error) {
	p := &envReader{env: env, read: map[string]string{}}
	for _, group := range groups {
		given := slices.IndexFunc(group, func(name string) bool { return p.readString(name, "") != "" })
		for _, name := range group {
			p.require(given < 0 || p.readString(name, "") != "", name, "is not set, but must be because %s is set", group[max(given, 0)])
		}
	}
	set := &settings{
		configPath: p.readString("CONFIG_PATH", "remotes.yaml"),
		listen:     p.readString("LISTEN_ADDR", ":8000"),
		dataDir:    p.readString("DATA_DIR", "data"),
		minFree:    p.readSize("MIN_FREE", ""),
		maxSize:    p.readSize("CACHE_MAX_SIZE", "0"),
		apiToken:   secret(p.readString("API_TOKEN", "")),
		tlsCert:    p.readString("TLS_CERT_FILE", ""),
		tlsKey:     p.readString("TLS_KEY_FILE", ""),
		logFormat:  p.readOneOf("LOG_FORMAT", "", "text", "json"),
		sealed:     p.readBool("SEALED", "false"),
	}
	_ = set.logLevel.UnmarshalText([]byte(p.readOneOf("LOG_LEVEL", "info", "debug", "info", "warn", "error"))) // which reports another word
	_, port, err := net.SplitHostPort(set.listen)
	_, portErr := strconv.ParseUint(port, 10, 16)
	p.require(err == nil && portErr == nil, "LISTEN_ADDR", "%q is not an address like :8000 or 127.0.0.1:8000", set.listen)
	// In Kubernetes, endpoints go on sending requests for a moment.
	drainDelay := "0s"
	if p.readString("KUBERNETES_SERVICE_HOST", "") != "" {
		drainDelay = "5s"
	}
	drainDelay = p.readString("DRAIN_DELAY", drainDelay)
	set.drainDelay, err = time.ParseDuration(drainDelay)
	p.require(err == nil && set.drainDelay >= 0, "DRAIN_DELAY", "%q is not a duration like 10s or 1m30s", drainDelay)
	for _, name := range []string{"API_TOKEN", "MINIO_ACCESS_KEY", "MINIO_SECRET_KEY", "DBUSER", "DBPASS", "DBNAME"} {
		p.require(isCleanSecret(p.readString(name, "")), name, uncleanSecret)
	}
	for _, name := range []string{"HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy"} {
		v := p.readString(name, "")
		if v != "" && !strings.Contains(v, "://") {
			v = "http://" + v // net/http reads it this way
		}
		p.require(v == "" || parseHostURL(v, "http", "https", "socks5", "socks5h") != nil, name,
			"is not a URL like http://proxy.example:3128")
	}
	if dir, err := filepath.Abs(set.dataDir); err == nil {
		set.dataDir = dir
	}
	p.readS3(&set.s3)
	p.readOtherBackends(set)
	set.shown = p.shownSettings(set)
	return set, errors.Join(p.errs...)
}

// envReader reads variables and collects the mistakes in them.
type envReader struct {
	env  lookupEnv
	read map[string]string // what was read, defaults included
	errs []error
}

// shownSettings returns what was read, and what libraries read for themselves, without
// secrets.
func (p *envReader) shownSettings(set *settings) map[string]string {
	for _, name := range []string{"NO_PROXY", "no_proxy", "SSL_CERT_FILE"} {
		p.readString(name, "")
	}
	p.read["DATA_DIR"] = set.dataDir
	p.read["MINIO_SECURE"] = strconv.FormatBool(set.s3.secure)
	p.read["MIN_FREE"] = cmp.Or(p.read["MIN_FREE"], "1GiB or 5 % of the disk, whichever is less")
	for name, v := range p.read {
		switch {
		case slices.Contains([]string{"API_TOKEN", "MINIO_SECRET_KEY", "DBPASS"}, name):
			p.read[name] = secret(v).String()
		case v == "" && strings.ToLower(name) == name: // another way to write a variable
			delete(p.read, name)
		case name == "REDIS_URL" || strings.HasSuffix(strings.ToUpper(name), "_PROXY"):
			p.read[name], _, _ = strings.Cut(userInfoPattern.ReplaceAllString(v, "$1***@"), "?")
		}
	}
	return p.read
}

// userInfoPattern matches what stands before the host in a URL, whose scheme may be
// missing, if there is user info.
var userInfoPattern = regexp.MustCompile(`^([a-z0-9]+://)?.*@`)

// require records a mistake in the variable name unless it is as it must be.
func (p *envReader) require(ok bool, name, format string, args ...any) {
	if !ok {
		p.errs = append(p.errs, fmt.Errorf("environment: %s: "+format, append([]any{name}, args...)...))
	}
}

// readString returns a variable's value, or the default value when it is unset or
// empty.
func (p *envReader) readString(name, defaultValue string) string {
	v, _ := p.env(name)
	v = cmp.Or(v, defaultValue)
	p.read[name] = cmp.Or(v, p.read[name])
	return v
}

// readSize reads a size like 10GiB, in bytes; -1 is none.
func (p *envReader) readSize(name, defaultValue string) int64 {
	v := p.readString(name, defaultValue)
	if v == "" {
		return -1
	}
	n, err := parseSize(v)
	p.require(err == nil, name, "%w", err)
	return n
}

// readOneOf reads one of some words, in upper or lower case, and returns it as it is
// written in values, or the default instead of another word.
func (p *envReader) readOneOf(name, defaultValue string, values ...string) string {
	v := p.readString(name, defaultValue)
	all := append([]string{defaultValue}, values...)
	i := slices.IndexFunc(all, func(word string) bool { return strings.EqualFold(v, word) })
	p.require(i >= 0, name, "%q is not one of %s", v, strings.Join(values, ", "))
	return all[max(i, 0)]
}

// readBool reads true or false, which may be written as 1 or 0.
func (p *envReader) readBool(name, defaultValue string) bool {
	v := p.readOneOf(name, defaultValue, "true", "false", "1", "0")
	return v == "true" || v == "1"
}

// readS3 reads the variables of S3 into c. MINIO_ENDPOINT is host:port or a URL, whose
// scheme must not contradict MINIO_SECURE.
func (p *envReader) readS3(c *s3Config) {
	endpoint := p.readString("MINIO_ENDPOINT", "")
	*c = s3Config{bucket: p.readString("MINIO_BUCKET", ""), accessKey: p.readString("MINIO_ACCESS_KEY", ""), secretKey: p.readString("MINIO_SECRET_KEY", ""),
		region: p.readString("MINIO_REGION", "us-east-1"), secure: p.readBool("MINIO_SECURE", ""), virtualHost: p.readBool("MINIO_VIRTUAL_HOST", "false")}
	for _, v := range [][2]string{{"MINIO_BUCKET", c.bucket}, {"MINIO_REGION", c.region}} {
		p.require(v[1] == "" || namePattern.MatchString(v[1]), v[0], "%q is not a valid name: use letters, digits, '.', '_' and '-'", v[1])
	}
	n := len(c.bucket)
	p.require(n == 0 || (n >= 3 && n <= 63), "MINIO_BUCKET", "%q is not the name of a bucket: those have 3 to 63 characters", c.bucket)
	if endpoint == "" {
		return
	}
	scheme, secure := "http", p.readString("MINIO_SECURE", "")
	if c.secure {
		scheme = "https"
	}
	if !strings.Contains(endpoint, "://") {
		endpoint = scheme + "://" + endpoint
	}
	u := parseHostURL(endpoint, "http", "https")
	isServer := u != nil && u.User == nil && strings.Trim(u.Path, "/") == "" && u.RawQuery == ""
	p.require(isServer, "MINIO_ENDPOINT", "is neither HOST:PORT nor a URL like https://s3.example:9000 (without path, query and user)")
	if isServer {
		p.require(secure == "" || scheme == u.Scheme, "MINIO_SECURE", "%s contradicts the scheme %s of MINIO_ENDPOINT", secure, u.Scheme)
		c.host, c.secure = u.Host, u.Scheme == "https"
	}
}

// readOtherBackends reads the variables of hot copies, PostgreSQL, Redis and the
// other replicas.
func (p *envReader) readOtherBackends(set *settings) {
	set.hotSize = p.readSize("HOT_CACHE_SIZE", "10GiB")
	set.db = sqlSettings{host: p.readString("DBHOST", ""), port: p.readString("DBPORT", "5432"), user: p.readString("DBUSER", ""), name: p.readString("DBNAME", ""),
		password: secret(p.readString("DBPASS", "")), sslmode: p.readOneOf("DBSSLMODE", "disable", "disable", "require", "verify-ca", "verify-full")}
	port, err := strconv.Atoi(set.db.port)
	p.require(err == nil && port >= 1 && port <= 65535, "DBPORT", "%q is not a port number", set.db.port)
	h := set.db.host
	p.require(h == "" || h[0] == '/' || hostPattern.MatchString(h) || net.ParseIP(h) != nil, "DBHOST",
		"is not the name or address of a host: put everything else into DBPORT, DBUSER, DBPASS and DBNAME")
	if v := p.readString("REDIS_URL", ""); v != "" {
		set.redis = parseHostURL(v, "redis", "rediss")
		p.require(set.redis != nil, "REDIS_URL", "is not a URL like redis://:PASSWORD@HOST:6379/0 (rediss:// for TLS; / in the password is %%2F)")
	}
	if set.redis != nil {
		db, err := strconv.Atoi(cmp.Or(strings.Trim(set.redis.Path, "/"), "0"))
		// The path is not shown: it may be a part of a password.
		p.require(err == nil && db >= 0, "REDIS_URL", "has a path that is not the number of a database")
	}
	if v := p.readString("PUBLIC_URL", ""); v != "" {
		u := parseHostURL(v, "http", "https")
		p.require(u != nil && u.User == nil && u.RawQuery == "", "PUBLIC_URL",
			"is not a URL like https://artifacts.example, below which clients find /api/")
	}
	set.advertise = strings.TrimSuffix(p.readString("ADVERTISE_URL", ""), "/")
	p.require(set.advertise == "" || isReplicaAddress(set.advertise), "ADVERTISE_URL",
		"is not a URL like http://10.0.0.7:8000, without a path")
}

// hostPattern matches the name of a host. The names of containers may have
// underscores, which DNS does not allow.
var hostPattern = regexp.MustCompile(`^[A-Za-z0-9._-]+$`)

// parseHostURL parses v as a URL that has a host, one of the schemes, no fragment
// and, if it has a port, a valid one. It returns nil for everything else.
func parseHostURL(v string, schemes ...string) *url.URL {
	u, err := url.Parse(v)
	if err != nil || u.Hostname() == "" || hasBadPort(u) || u.Fragment != "" || !slices.Contains(schemes, u.Scheme) {
		return nil
	}
	return u
}

// redisPrefix returns the prefix of this cache's keys in Redis, so that several
// caches can share one Redis: the bucket's name, since replicas may spell its endpoint
// differently, or without S3 a random id that is kept in DATA_DIR.
func (set *settings) redisPrefix() string {
	if set.s3.bucket != "" {
		return set.s3.bucket
	}
	name := filepath.Join(set.dataDir, ".id")
	if id, err := os.ReadFile(name); err == nil && isHex(string(id), 16) {
		return "disk/" + string(id)
	}
	id := fmt.Sprintf("%016x", rand.Uint64())
	_ = os.MkdirAll(set.dataDir, 0o755)
	_ = os.WriteFile(name, []byte(id), 0o644) // without it the marks are lost at the next start, which costs revalidations
	return "disk/" + id
}

// urlAt returns the URL of this server, which is reached at host.
func (set *settings) urlAt(host string) string {
	scheme := "http"
	if set.tlsCert != "" {
		scheme = "https"
	}
	_, port, _ := net.SplitHostPort(set.listen) // parseSettings has checked it
	return scheme + "://" + net.JoinHostPort(host, port)
}
