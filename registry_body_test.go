package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"runtime"
	"strings"
	"testing"
)

func TestReadManifest(t *testing.T) {
	t.Parallel()
	d, other := sha256Of([]byte("a")), sha256Of([]byte("b"))
	for text, want := range map[string]string{
		`{"schemaVersion":2,"config":{"digest":"` + d + `","size":7},"layers":[{"size":1,"digest":"` + other + `","annotations":{"a":["]",{}]}}]}`: "config [{" + d + " 7} {" + other + " 1}]",
		`{"layers":[{"digest":"` + d + `"},5,null,[{}],"x"],"schemaVersion":1}`:                                                                    "[{" + d + " 0}]",
		`{"schemaVersion":2,"layers":{"digest":"` + d + `"},"config":null}`:                                                                        "[] no list",
		`{"schemaVersion":2,"layers":null,"config":{"digest":"sha256:no"}}`:                                                                        "config []",
		`{"schemaVersion":2,"mediaType":5,"manifests":[{"digest":"` + d + `"}]}`:                                                                   "manifests []",
		` {"schemaVersion":null} ` + "\n":                                                                                                          "[]",
		`{"mediaType":"a/b"}`:                                                                                                                      "a/b [] no schemaVersion",
		`{"schemaVersion":2}{}`:                                                                                                                    "[] more than an object",
		`{"schemaVersion":2,"config":{"digest":"` + d + `"}`:                                                                                       "[] EOF",
		`["schemaVersion"]`: "[] no object",
		`{"schemaVersion":2,"x":` + strings.Repeat("[", 20_000) + strings.Repeat("]", 20_000) + `}`: "[] invalid character '[' exceeded max depth",
	} {
		m, err := readManifest(strings.NewReader(text))
		got := fmt.Sprint(m.blobs)
		for name, is := range map[string]bool{"config": m.suggested == typeManifest, "manifests": m.suggested == typeIndex, m.declared: m.declared != ""} {
			if is {
				got = name + " " + got
			}
		}
		if err != nil {
			got += " " + err.Error()
		}
		if got != want {
			t.Errorf("%.200s: %s; want %s", text, got, want)
		}
	}
}

// A body with millions of members must not become millions of values. Not parallel: it
// measures the memory.
func TestHostileBodiesAreReadAsStreams(t *testing.T) {
	const members = 50_000
	for name, c := range map[string]struct {
		before, member, after string
		read                  func(io.Reader) error
	}{
		"tags":    {`{"tags":["a"`, `,"tag-b"`, `]}`, func(r io.Reader) error { _, err := countList(r, "tags"); return err }},
		"no tags": {`{"tags":[],"x":[[]`, `,{}`, `]}`, func(r io.Reader) error { _, err := countList(r, "tags"); return err }},
		"layers":  {`{"schemaVersion":2,"layers":[{}`, `,{"digest":"` + sha256Of(nil) + `"}`, `]}`, func(r io.Reader) error { _, err := readManifest(r); return err }},
		"members": {`{"schemaVersion":2`, `,"m":0`, `}`, func(r io.Reader) error { _, err := readManifest(r); return err }},
		"config":  {`{"schemaVersion":2,"config":[[]`, `,[]`, `]}`, func(r io.Reader) error { _, err := readManifest(r); return err }},
	} {
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		end := readerFunc(func([]byte) (int, error) {
			runtime.GC()
			runtime.ReadMemStats(&after)
			return 0, io.EOF
		})
		left := members
		more := readerFunc(func(p []byte) (int, error) {
			if left == 0 {
				return 0, io.EOF
			}
			left--
			return copy(p, c.member), nil
		})
		body := io.MultiReader(strings.NewReader(c.before), bufio.NewReader(more), strings.NewReader(c.after), end)
		if err := c.read(body); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 600_000 {
			t.Errorf("%s: %d bytes of memory for %d members", name, grown, members)
		}
	}
}

type readerFunc func(p []byte) (int, error)

func (f readerFunc) Read(p []byte) (int, error) { return f(p) }

// What is read as a stream is what the whole text says.
func FuzzReadObject(f *testing.F) {
	f.Add(`{"schemaVersion":2,"layers":[{"digest":"x"}],"config":{}}`)
	f.Add(`{"tags":null,"a":[{"b":"\u0041"},1e999]}`)
	f.Fuzz(func(t *testing.T, text string) {
		var whole map[string]json.RawMessage
		valid := json.Unmarshal([]byte(text), &whole) == nil && whole != nil
		err := readObject(strings.NewReader(text), func(d *json.Decoder, name string) error {
			if _, found := whole[name]; valid && !found {
				t.Errorf("%q: there is no member %q", text, name)
			}
			return skipNext(d)
		})
		if (err == nil) != valid {
			t.Errorf("%q: %v, but valid is %v", text, err, valid)
		}
	})
}
