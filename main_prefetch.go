// main_prefetch.go: artifactapi prefetch, which has the running server fetch files.

package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
	"unicode"
)

// prefetchCommand is artifactapi prefetch.
type prefetchCommand struct {
	server string // its URL
	token  secret
	client *http.Client
	out    io.Writer
	hasBar bool // the output is a terminal
}

// runPrefetch has the server fetch what args say. Its error says that it could not, or
// that files failed; errUsage is about args.
func runPrefetch(ctx context.Context, set *settings, args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("prefetch", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	server := flags.String("server", "", "")
	dryRun := flags.Bool("dry-run", false, "")
	prefix := flags.String("prefix", "", "")
	platforms := flags.String("platforms", "", "")
	if err := flags.Parse(args); err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	if flags.NArg() == 0 || (flags.NArg() == 1) != (flags.Arg(0) == "-") {
		return errUsage
	}
	for _, arg := range flags.Args() { // it would become a pattern, and --dry-run would fetch
		if strings.HasPrefix(arg, "--") {
			return fmt.Errorf("%w: options come first: %q", errUsage, arg)
		}
	}
	c := &prefetchCommand{token: set.apiToken, out: stdout, hasBar: isTerminal(stdout), client: &http.Client{Transport: &http.Transport{}}}
	if c.server = strings.TrimRight(*server, "/"); c.server == "" {
		var err error
		if c.server, err = localURL(set); err != nil {
			return err
		}
		c.client = newLocalClient()
	}
	defer c.client.CloseIdleConnections()
	if flags.Arg(0) == "-" {
		text, err := io.ReadAll(io.LimitReader(stdin, maxPrefetchText+1)) // first: what makes the text may take long
		if err != nil {
			return fmt.Errorf("reading standard input: %w", err)
		}
		return c.post(ctx, "text/plain", text, *dryRun)
	}
	req := prefetchRequest{Remote: flags.Arg(0), Prefix: *prefix, Arguments: flags.Args()[1:]}
	if *platforms != "" {
		req.Platforms = strings.Split(*platforms, ",")
	}
	body, _ := json.Marshal(req) // strings and booleans can be encoded
	return c.post(ctx, "application/json", body, *dryRun)
}

// prefetchEvent is any event of a run.
type prefetchEvent struct {
	progressEvent
	Remote, Path, Source, Detail string
	Size                         *int64
	Stored                       bool
	Status                       int
	Fetched, Cached              int64
	Seconds                      float64
}

// post starts a run.
func (c *prefetchCommand) post(ctx context.Context, contentType string, body []byte, dryRun bool) error {
	path := "/cache-artifact"
	if dryRun {
		path += "?dry_run=true"
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, c.server+path, bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("--server: %w", err)
	}
	req.Header.Set("Content-Type", contentType)
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+string(c.token))
	}
	res, err := c.client.Do(req)
	if err != nil {
		return fmt.Errorf("asking the server: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		var answer struct{ Detail string }
		_ = json.NewDecoder(io.LimitReader(res.Body, copyBufferSize)).Decode(&answer) // another server's is not shown
		return fmt.Errorf("%s answered %d: %s", c.server, res.StatusCode, printable(cmp.Or(answer.Detail, http.StatusText(res.StatusCode))))
	}
	return c.show(res.Body, dryRun)
}

// show shows the events of a run until it ends.
func (c *prefetchCommand) show(events io.Reader, dryRun bool) error {
	var last progressEvent
	failed := 0
	for lines := json.NewDecoder(events); ; {
		var e prefetchEvent
		if err := lines.Decode(&e); err != nil {
			c.clearBar()
			return fmt.Errorf("the server ended its answer early, not all was fetched: %w", err)
		}
		switch e.Event {
		case "failed":
			if e.Remote != "" {
				failed++
				c.printLine("failed: %s/%s: %d %s", e.Remote, e.Path, e.Status, e.Detail)
			} else {
				c.printLine("skipped: %s: %s", e.Path, e.Detail)
			}
		case "found":
			if dryRun && !e.Stored {
				c.printLine("%s/%s", e.Remote, e.Path)
			}
		case "summary":
			c.printLine("%d found, %d fetched, %d there already, %d failed, %s in %.1f s", e.Found, e.Fetched, e.Cached, e.Failed, formatBytes(e.Bytes), e.Seconds)
			if failed > 0 {
				return fmt.Errorf("not fetched: %d of %d files", failed, e.Found)
			}
			return nil
		}
		if c.hasBar && e.Event == "progress" {
			fmt.Fprint(c.out, "\r", drawBar(last, e.progressEvent), "\x1b[K")
			last = e.progressEvent
		}
	}
}

// printLine prints a line, above the progress bar.
func (c *prefetchCommand) printLine(format string, args ...any) {
	c.clearBar()
	fmt.Fprintln(c.out, printable(fmt.Sprintf(format, args...)))
}

func (c *prefetchCommand) clearBar() {
	if c.hasBar {
		fmt.Fprint(c.out, "\r\x1b[K")
	}
}

// printable is s without what could move a terminal's cursor: names come from outside.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return '?'
		}
		return r
	}, s)
}

// drawBar draws how far a run is, in less than 80 columns. last is the progress a
// second ago.
func drawBar(last, p progressEvent) string {
	const width = 20
	done := p.Done + p.Failed
	filled := int(width * min(done, p.Found) / max(p.Found, 1))
	left := "-"
	if rate := done - last.Done - last.Failed; rate > 0 {
		left = (time.Duration(max(p.Found-done, 0)/rate) * time.Second).String()
	}
	return fmt.Sprintf("[%s%s] %d/%d files, %s, %s/s, %s left", strings.Repeat("#", filled), strings.Repeat(".", width-filled),
		done, p.Found, formatBytes(p.Bytes), formatBytes(p.BytesPerSecond), left)
}
