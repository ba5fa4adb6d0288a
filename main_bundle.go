// main_bundle.go: the commands that carry a store elsewhere: export, have and import.

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"time"
)

// errUsage is for arguments that the usage does not allow.
var errUsage = errors.New("wrong arguments")

// bundleCommand is export, have or import. They work beside a server and without one.
type bundleCommand struct {
	set            *settings
	env            lookupEnv
	now            func() time.Time
	stdin          io.Reader
	stdout, stderr io.Writer
}

// open opens the stores, and the configuration, which is empty if it is not valid: what
// is stored can be carried all the same.
func (c *bundleCommand) open() (*stores, *config) {
	c.set.hotSize = 0 // hot copies are the server's
	st := openStores(c.set, c.now, slog.New(slog.NewTextHandler(c.stderr, &slog.HandlerOptions{Level: slog.LevelWarn})))
	cfg, err := loadConfig(c.set.configPath, c.env)
	if err != nil {
		cfg = new(config)
	}
	st.disk.isIrreplaceable = cfg.isIrreplaceable
	st.disk.memory = newLRU[*memoryEntry](0, 0) // each object is used once
	return st, cfg
}

// exportStored writes a bundle to stdout. args name remotes (none: all), and behind
// --have a file of the sums whose bodies stay out.
func (c *bundleCommand) exportStored(ctx context.Context, args []string) error {
	b := &bundleWriter{leaveOut: map[string]bool{}, time: c.now()}
	for ; len(args) > 0; args = args[1:] {
		switch {
		case args[0] == "--have" && len(args) > 1:
			args = args[1:]
			if err := readSums(args[0], b.leaveOut); err != nil {
				return err
			}
		case strings.HasPrefix(args[0], "-"):
			return fmt.Errorf("%w: %q", errUsage, args[0])
		default:
			b.remotes = append(b.remotes, args[0])
		}
	}
	if isTerminal(c.stdout) {
		return errors.New("export writes a tar, which is not for a terminal: artifactapi export > bundle.tar")
	}
	st, cfg := c.open()
	defer st.Close()
	st.disk.listsAll = true // a bundle without what it cannot read would pass for a backup
	b.objects, b.createFile, b.config = st.objects, st.disk.newSpool, cfg
	return b.write(ctx, c.stdout)
}

// readSums reads what have has printed.
func readSums(name string, sums map[string]bool) error {
	f, err := os.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if !isSHA256(lines.Text()) {
			return fmt.Errorf("%s: %.100q is not a line that artifactapi have prints", name, lines.Text())
		}
		sums[lines.Text()] = true
	}
	return lines.Err()
}

// listSums prints the SHA-256 of each stored body once.
func (c *bundleCommand) listSums(ctx context.Context) error {
	st, _ := c.open()
	defer st.Close()
	printed := map[string]bool{}
	out := bufio.NewWriter(c.stdout)
	err := st.objects.walk(ctx, func(_ string, rec *record) error {
		if !printed[rec.SHA256] {
			printed[rec.SHA256] = true
			fmt.Fprintln(out, rec.SHA256)
		}
		return nil
	})
	if errors.Is(err, errS3NoBucket) {
		err = nil // import makes it: a site that has nothing yet asks for all
	}
	return errors.Join(err, out.Flush())
}

// importStored stores the bundle that comes from stdin.
func (c *bundleCommand) importStored(ctx context.Context) error {
	if isTerminal(c.stdin) {
		return errors.New("import reads a bundle, and its input is a terminal: artifactapi import < bundle.tar")
	}
	st, _ := c.open()
	defer st.Close()
	if c.set.s3.bucket != "" { // a missing bucket is made
		if err := st.backends[len(st.backends)-1].ping(ctx); err != nil {
			return err
		}
	}
	dir, err := st.disk.newStagingDir()
	if err != nil {
		return err
	}
	defer dir.Close()
	defer os.RemoveAll(dir.Name())
	b := &bundleReader{dir: dir.Name(),
		cacheStores: cacheStores{objects: st.objects, index: st.index, space: st.space, replicas: st.replicas},
		missing: func(rec *record) {
			fmt.Fprintf(c.stdout, "missing: sha256 %s of %s/%s\n", rec.SHA256, rec.Remote, decodePath(rec.Path))
		}}
	err = b.readAndStore(ctx, c.stdin)
	if stored := b.stored.Load(); st.embedded != nil && stored > 0 {
		err = errors.Join(err, st.embedded.announceImport())
	}
	if err == nil {
		fmt.Fprintf(c.stdout, "%d files imported, %d were there\n", b.stored.Load(), len(b.there))
	}
	return err
}

// isTerminal reports whether a stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	if !ok {
		return false
	}
	fi, err := f.Stat()
	null, nullErr := os.Stat(os.DevNull)
	return err == nil && nullErr == nil && fi.Mode()&os.ModeCharDevice != 0 && !os.SameFile(fi, null)
}
