// cache_announce.go: what replicas tell each other about files that were replaced
// or removed.

package main

import (
	"context"
	"regexp"
	"strings"
	"sync/atomic"
)

// An announcement is a key that was replaced, or begins with one of these. No key
// does.
const (
	removedPrefix  = "-" // a key that was removed
	fillsPrefix    = "?" // a remote's name, a blank and a pattern: fills that were purged
	everythingSign = "*" // announcements were lost: anything may have changed
)

// announcer announces changes of files to the other replicas.
type announcer struct {
	replicas replicas // nil on a single machine
	onError  func(announcement string, err error)
	lost     atomic.Bool // an announcement was not sent
}

// announce tells the other replicas to drop what they keep of a key. They may hear
// each other while this one is not heard: then announceLost makes up for it.
func (a *announcer) announce(ctx context.Context, announcement string) {
	if a.replicas == nil {
		return
	}
	if err := a.replicas.announceChange(ctx, announcement); err != nil {
		a.onError(announcement, err)
		a.lost.Store(true)
	}
}

// announceLost announces that anything may have changed, if an announcement was
// lost and Redis is back.
func (a *announcer) announceLost(ctx context.Context) {
	if a.replicas == nil || !a.replicas.hearsChanges() || !a.lost.Swap(false) {
		return
	}
	if a.replicas.announceChange(ctx, everythingSign) != nil {
		a.lost.Store(true)
	}
}

// onChange applies what another replica announced. A fill of that key that goes on
// here began before the change, and is not stored.
func (c *cache) onChange(announced string) {
	if announced == everythingSign {
		c.objects.invalidate("")
		return
	}
	if what, ok := strings.CutPrefix(announced, fillsPrefix); ok {
		remote, text, _ := strings.Cut(what, " ")
		if pattern, err := regexp.Compile(text); err == nil {
			for _, key := range c.fills.matching(remote, pattern) {
				c.onChange(removedPrefix + key)
			}
		}
		return
	}
	key, removed := strings.CutPrefix(announced, removedPrefix)
	fate := fatePurgedHere
	if removed {
		fate = fatePurgedElsewhere
	}
	c.missing.delete(key)
	c.objects.invalidate(key)
	if f := c.fills.take(key); f != nil {
		f.setFate(fate)
	}
}
