// main_client.go: asking the server on this machine.

package main

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"net/http"
	"time"
)

// askHealth asks /health of the server on this machine and returns nil for 200.
// It is HEALTHCHECK's command, because the image has no shell and no curl.
func askHealth(ctx context.Context, set *settings) error {
	server, err := localURL(set)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, server+"/health", nil)
	if err != nil {
		return fmt.Errorf("LISTEN_ADDR: %w", err)
	}
	res, err := newLocalClient().Do(req)
	if err != nil {
		return fmt.Errorf("asking /health: %w", err)
	}
	res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("/health answered %s", res.Status)
	}
	return nil
}

// healthTimeout bounds healthcheck. /health answers within 100 ms, and Docker
// itself waits 30 s by default.
const healthTimeout = 3 * time.Second

// localURL returns the URL of the server on this machine.
func localURL(set *settings) (string, error) {
	host, port, err := net.SplitHostPort(set.listen)
	if err != nil {
		return "", fmt.Errorf("LISTEN_ADDR: %w", err)
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "localhost"
	}
	scheme := "http"
	if set.tlsCert != "" {
		scheme = "https"
	}
	return scheme + "://" + net.JoinHostPort(host, port), nil
}

// newLocalClient returns a client for the server on this machine. Its certificate is not
// verified: it holds the server's public name, not localhost. No proxy is used:
// HTTP_PROXY and the like are for upstreams.
func newLocalClient() *http.Client {
	return &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
}
