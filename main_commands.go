// main_commands.go: the commands beside serve: check, healthcheck, verify, reindex.

package main

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// checkConfig validates the configuration file that args names, or else
// CONFIG_PATH. Its error lists all mistakes of the file, a line each.
func checkConfig(set *settings, args []string, env lookupEnv, stdout io.Writer) error {
	name := set.configPath
	if len(args) == 1 {
		name = args[0]
	}
	cfg, err := loadConfig(name, env)
	if err != nil {
		return err
	}
	if set.tlsCert != "" {
		if _, err := tls.LoadX509KeyPair(set.tlsCert, set.tlsKey); err != nil {
			return fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
		}
	}
	for _, w := range cfg.warnings {
		fmt.Fprintln(stdout, "warning:", w)
	}
	fmt.Fprintf(stdout, "%s: valid, %d remotes\n", name, len(cfg.names))
	return nil
}

// loadConfig reads and parses the configuration file name. env gives the
// variables that the file uses as ${VAR}.
func loadConfig(name string, env lookupEnv) (*config, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading the configuration: %w (CONFIG_PATH names the file)", err)
	}
	return parseConfig(name, data, env)
}

// askHealth asks /health of the server on this machine and returns nil for 200.
// It is HEALTHCHECK's command, because the image has no shell and no curl.
func askHealth(set *settings) error {
	client := newLocalClient()
	client.Timeout = 3 * time.Second // /health answers within 100 ms, and Docker itself waits 30 s
	res, err := client.Get(localURL(set) + "/health")
	if err != nil {
		return fmt.Errorf("asking /health: %w", err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("/health answered %s", res.Status)
	}
	return nil
}

// localURL returns the URL of the server on this machine.
func localURL(set *settings) string {
	host, _, _ := net.SplitHostPort(set.listen)
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "localhost"
	}
	return set.urlAt(host)
}

// newLocalClient returns a client for the server on this machine. Its certificate is not
// verified: it holds the server's public name, not localhost. No proxy is used:
// HTTP_PROXY and the like are for upstreams.
func newLocalClient() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}

// becomeOwner makes root the user who runs the server, for good: that one could not read
// what root writes to DATA_DIR. The lock in it is the server's, unless none has run yet.
func becomeOwner(dataDir string) error {
	fi, err := os.Stat(filepath.Join(dataDir, lockFile))
	if err != nil {
		fi, err = os.Stat(dataDir)
	}
	if err != nil || os.Geteuid() != 0 {
		return nil // whoever needs the directory says what is wrong with it
	}
	owner := fi.Sys().(*syscall.Stat_t)
	if owner.Uid == 0 {
		return nil
	}
	uid, gid := int(owner.Uid), int(owner.Gid)
	if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(gid), syscall.Setuid(uid)); err != nil {
		return fmt.Errorf("DATA_DIR %s is used by the server of user %d, who could not read what root writes there: run this as that user: %w", dataDir, uid, err)
	}
	return nil
}

// verifyStored hashes everything stored and drops what does not match its record.
// It may run beside a server. Its error says that something was dropped or could
// not be read.
func verifyStored(ctx context.Context, set *settings, env lookupEnv, now func() time.Time, stdout io.Writer) error {
	st := openStores(set, now, slog.New(slog.DiscardHandler))
	defer st.Close()
	// Without a valid configuration no remote is known to have an upstream, so
	// nothing damaged is removed.
	cfg, configErr := loadConfig(set.configPath, env)
	st.disk.isIrreplaceable = func(remote string) bool { return configErr != nil || cfg.isIrreplaceable(remote) }
	reported, dropped := 0, 0
	checked, err := st.objects.verify(ctx, func(key string, err error) {
		reported++
		if errors.Is(err, errDropped) {
			dropped++
		}
		fmt.Fprintf(stdout, "%s: %v\n", key, err)
	})
	fmt.Fprintf(stdout, "%d checked, %d dropped\n", checked, dropped)
	if err == nil && checked == 0 && reported == 0 {
		where := "DATA_DIR " + set.dataDir
		if set.s3.bucket != "" {
			where = "the bucket " + set.s3.bucket
		}
		fmt.Fprintf(stdout, "nothing is stored in %s: is it the right one?\n", where)
	}
	if err == nil && reported > 0 {
		err = fmt.Errorf("%d files were dropped, could not be read, or are strays; a dropped file is fetched again when a client asks for it", reported)
	}
	return err
}

// reindexStored adds an index row for each object without one and removes the rows
// without an object. The index in PostgreSQL can be corrected beside running
// replicas. The embedded index is in the memory of the server that owns DATA_DIR,
// so no server may run.
func reindexStored(ctx context.Context, set *settings, now func() time.Time, stdout io.Writer) error {
	st := openStores(set, now, slog.New(slog.DiscardHandler))
	defer st.Close()
	if st.sql != nil {
		changed := 0
		err := reindex(ctx, st.objects, st.sql, func(change, key string) {
			changed++
			fmt.Fprintln(stdout, change, key)
		})
		fmt.Fprintf(stdout, "%d rows corrected\n", changed)
		return err
	}
	switch locked, err := st.disk.lockData(); {
	case err != nil:
		return err
	case !locked:
		return errors.New("a running server uses DATA_DIR and has the index in its memory: stop the server first (it also corrects the index itself at each start)")
	}
	if err := st.embedded.reconcile(ctx, st.objects); err != nil {
		return err
	}
	totals, err := st.embedded.totals(ctx, false)
	for name, t := range totals {
		fmt.Fprintf(stdout, "%s: %d files, %d bytes\n", name, t.Files, t.Bytes)
	}
	return errors.Join(err, st.embedded.saveSnapshot())
}
