package main

import (
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestScripts plays the stories in testdata/*.txt, a command a line:
//
//	remote KEY: VALUE            a key of remote r in remotes.yaml, before all else
//	local                        a local repository l, written with token t
//	origin PATH STATUS "TEXT" [Header: "value" ...]
//	origin gone PATH             404 from here on
//	origin down|up|stalls|resets|STATUS
//	get|head|delete PATH [Header: "value" ...]
//	put PATH "TEXT" [Header: "value" ...]
//	advance DURATION
//	restart
//
// and about the last answer, or the origin:
//
//	status == 200                body == "text"
//	source == cache              cache-status ~ "unreachable"
//	header NAME == "value"       asked [METHOD ]PATH == 2
//
// where == is equal and ~ is contains. Text is a Go string; # begins a comment.
func TestScripts(t *testing.T) {
	t.Parallel()
	names, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(names) == 0 {
		t.Fatalf("no scripts in testdata: %v", err)
	}
	for _, name := range names {
		t.Run(strings.TrimSuffix(filepath.Base(name), ".txt"), func(t *testing.T) {
			t.Parallel()
			data, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			s := &testStory{T: t, name: name}
			for n, line := range strings.Split(string(data), "\n") {
				s.line = n + 1
				if words := s.words(line); len(words) > 0 {
					s.play(words)
				}
			}
		})
	}
}

// testStory is one script being played.
type testStory struct {
	*testing.T
	name  string
	line  int
	keys  []string // of r, until the tester is there
	local bool
	tt    *tester
	last  *got
}

func (s *testStory) fail(format string, args ...any) {
	s.Helper()
	s.Fatalf("%s:%d: "+format, append([]any{s.name, s.line}, args...)...)
}

// words splits a line; strings are unquoted.
func (s *testStory) words(line string) (words []string) {
	for line = strings.TrimSpace(line); line != "" && line[0] != '#'; line = strings.TrimSpace(line) {
		if line[0] == '"' {
			quoted, err := strconv.QuotedPrefix(line)
			if err != nil {
				s.fail("bad string in %s", line)
			}
			word, _ := strconv.Unquote(quoted)
			words, line = append(words, word), line[len(quoted):]
			continue
		}
		word, rest, _ := strings.Cut(line, " ")
		words, line = append(words, word), rest
		if word == "remote" && len(words) == 1 {
			return append(words, rest) // the rest is YAML
		}
	}
	return words
}

// play does one command.
func (s *testStory) play(words []string) {
	s.Helper()
	verb, args := words[0], words[1:]
	switch {
	case verb == "remote":
		s.keys = append(s.keys, args[0])
	case verb == "local":
		s.local = true
	case s.tt == nil:
		s.begin()
		s.play(words)
	case verb == "origin":
		s.playOrigin(args)
	case verb == "advance":
		d, err := time.ParseDuration(args[0])
		if err != nil {
			s.fail("%v", err)
		}
		s.tt.advance(d)
	case verb == "restart":
		s.tt.restart()
	case verb == "put":
		s.last = s.tt.put(args[0], args[1], headerLines(args[2:])...)
	case verb == "get", verb == "head", verb == "delete":
		s.last = s.tt.send(strings.ToUpper(verb), args[0], nil, headerLines(args[1:])...)
	default:
		s.check(words)
	}
}

func (s *testStory) begin() {
	set := setup{keys: s.keys, env: map[string]string{"API_TOKEN": "t"}}
	if s.local {
		set.yaml = remoteYAML("ORIGIN", s.keys...) + "  l: {type: local}\n"
	}
	s.tt = set.start(s.T)
}

// headerLines joins Name: "value" pairs.
func headerLines(words []string) (lines []string) {
	for i := 0; i+1 < len(words); i += 2 {
		lines = append(lines, words[i]+" "+words[i+1])
	}
	return lines
}

func (s *testStory) playOrigin(args []string) {
	s.Helper()
	o := s.tt.origin
	switch status, err := strconv.Atoi(args[0]); {
	case err == nil:
		o.troubled(answers(status))
	case args[0] == "down":
		s.tt.down()
	case args[0] == "up":
		o.troubled(nil)
		o.setDown(false)
	case args[0] == "stalls":
		o.troubled(o.stalls)
	case args[0] == "resets":
		o.troubled(o.resets)
	case args[0] == "gone":
		o.remove(args[1])
	default:
		s.file(o, args)
	}
}

// file is "PATH STATUS TEXT [Header: value ...]".
func (s *testStory) file(o *testOrigin, args []string) {
	s.Helper()
	if len(args) < 3 {
		s.fail("origin PATH STATUS \"TEXT\"")
	}
	f := o.file(args[0], args[2])
	if status, err := strconv.Atoi(args[1]); err != nil {
		s.fail("%v", err)
	} else if status != http.StatusOK {
		f.answering(status)
	}
	for _, h := range headerLines(args[3:]) {
		name, value, _ := strings.Cut(h, ": ")
		if t, err := http.ParseTime(value); err == nil && name == "Last-Modified" {
			f.at(t)
			continue
		}
		f.says(name, value)
	}
}

// check compares what is there with what is wanted.
func (s *testStory) check(words []string) {
	s.Helper()
	n := len(words)
	if n < 3 || words[n-2] != "==" && words[n-2] != "~" {
		s.fail("what does %q mean?", words)
	}
	what, op, want := words[:n-2], words[n-2], words[n-1]
	is := s.value(what)
	if op == "==" && is != want || op == "~" && !strings.Contains(is, want) {
		s.Errorf("%s:%d: %s is %q, want %s %q", s.name, s.line, strings.Join(what, " "), is, op, want)
	}
}

func (s *testStory) value(what []string) string {
	s.Helper()
	if what[0] == "asked" {
		return strconv.Itoa(s.tt.origin.requests(strings.Join(what[1:], " ")))
	}
	if s.last == nil || s.last.err != nil {
		s.fail("no answer: %+v", s.last)
	}
	switch {
	case what[0] == "status":
		return strconv.Itoa(s.last.status)
	case what[0] == "body":
		return s.last.text
	case what[0] == "source":
		return s.last.header.Get("X-Artifact-Source")
	case what[0] == "cache-status":
		return s.last.header.Get("Cache-Status")
	case what[0] == "header" && len(what) == 2:
		return s.last.header.Get(what[1])
	}
	s.fail("nobody knows %q", what)
	return ""
}
