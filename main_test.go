package main

import "testing"

func TestChangedConfigurationIsNoticed(t *testing.T) {
	t.Parallel()
	c := childSetup{yaml: remoteYAML("http://127.0.0.1:1")}.start(t)
	c.configure(remoteYAML("http://127.0.0.1:2"))
	c.wantLog("configuration loaded")
	if g := c.tester().get("/config"); !g.has("127.0.0.1:2") {
		t.Errorf("in force: %s", g.text)
	}
}
