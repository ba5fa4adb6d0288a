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

// runPrefetch has the server fetch what args say. Its error says that it could not, or
// that files failed; errUsage is about args.
func runPrefetch(ctx context.Context, set *settings, args []string, stdin io.Reader, stdout io.Writer) error {
	flags := flag.NewFlagSet("prefetch", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	server := flags.String("server", "", "")
	dryRun := flags.Bool("dry-run", false, "")
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
	client, url := &http.Client{Transport: &http.Transport{}}, strings.TrimRight(*server, "/")
	if url == "" {
		client, url = newLocalClient(), localURL(set)
	}
	defer client.CloseIdleConnections()
	name, prefix, _ := strings.Cut(flags.Arg(0), "/") // no remote has a slash in its name
	contentType := "application/json"
	body, err := json.Marshal(prefetchRequest{Remote: name, Prefix: prefix, Arguments: flags.Args()[1:]})
	if flags.Arg(0) == "-" {
		contentType = "text/plain"
		body, err = io.ReadAll(io.LimitReader(stdin, maxPrefetchText+1)) // first: what makes the text may take long
	}
	if err != nil {
		return fmt.Errorf("reading standard input: %w", err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, fmt.Sprintf("%s/cache-artifact?dry_run=%t", url, *dryRun), bytes.NewReader(body))
	if err != nil {
		return fmt.Errorf("--server: %w", err)
	}
	req.Header.Set("Content-Type", contentType)
	if set.apiToken != "" {
		req.Header.Set("Authorization", "Bearer "+string(set.apiToken))
	}
	res, err := client.Do(req)
	if err != nil {
		return fmt.Errorf("asking the server: %w", err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		var answer struct{ Detail string }
		_ = json.NewDecoder(io.LimitReader(res.Body, copyBufferSize)).Decode(&answer) // another server's is not shown
		return fmt.Errorf("%s answered %d: %s", url, res.StatusCode, printable(cmp.Or(answer.Detail, http.StatusText(res.StatusCode))))
	}
	return showRun(res.Body, stdout, isTerminal(stdout), *dryRun)
}

// prefetchEvent is any event of a run.
type prefetchEvent struct {
	progressEvent
	Remote, Path, Detail string
	Stored               bool
	Status               int
	Fetched, Cached      int64
	Seconds              float64
}

// showRun shows the events of a run until it ends, with a progress bar on a terminal.
func showRun(events io.Reader, out io.Writer, hasBar, dryRun bool) error {
	emptyLine := ""
	if hasBar {
		emptyLine = "\r\x1b[K"
	}
	printLine := func(format string, args ...any) {
		fmt.Fprintln(out, emptyLine+printable(fmt.Sprintf(format, args...)))
	}
	var last progressEvent
	failed := 0
	for lines := json.NewDecoder(events); ; {
		var e prefetchEvent
		if err := lines.Decode(&e); err != nil {
			fmt.Fprint(out, emptyLine)
			return fmt.Errorf("the server ended its answer early, not all was fetched: %w", err)
		}
		switch {
		case e.Event == "failed" && e.Remote == "":
			printLine("skipped: %s: %s", e.Path, e.Detail)
		case e.Event == "failed":
			failed++
			printLine("failed: %s/%s: %d %s", e.Remote, e.Path, e.Status, e.Detail)
		case e.Event == "found" && dryRun && !e.Stored:
			printLine("%s/%s", e.Remote, e.Path)
		case e.Event == "progress" && hasBar:
			fmt.Fprint(out, emptyLine, drawBar(last, e.progressEvent))
			last = e.progressEvent
		case e.Event == "summary":
			printLine("%d found, %d fetched, %d there already, %d failed, %s in %.1f s", e.Found, e.Fetched, e.Cached, e.Failed, formatBytes(e.Bytes), e.Seconds)
			if failed > 0 {
				return fmt.Errorf("not fetched: %d files", failed)
			}
			return nil
		}
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
