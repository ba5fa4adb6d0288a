// api_clients.go: what the page tells clients to write into their configuration.

package main

import (
	"cmp"
	"net/url"
	"slices"
	"strings"
)

// clientSetting is how one client is pointed to a remote.
type clientSetting struct {
	Client string
	File   string // where Text belongs; "": it is a command
	Text   string
}

// clientSettings are the settings by package; the first that fits is shown first. In
// the texts ORIGIN is our scheme and host, HOST our host, REMOTE the remote's name,
// REGISTRY the registry it mirrors. Lines with HTTP-ONLY are for plain HTTP.
var clientSettings = []struct {
	packages []string
	clientSetting
}{
	{[]string{"rpm"}, clientSetting{"dnf", "/etc/yum.repos.d/REMOTE.repo", `[REMOTE]
name=REMOTE
baseurl=ORIGIN/api/REMOTE/PATH/TO/REPOSITORY/
enabled=1
`}},
	{[]string{"alpine"}, clientSetting{"apk", "/etc/apk/repositories", `ORIGIN/api/REMOTE/v3.22/main
ORIGIN/api/REMOTE/v3.22/community
`}},
	{[]string{"deb", "generic"}, clientSetting{"apt", "/etc/apt/sources.list.d/REMOTE.list", `deb ORIGIN/api/REMOTE SUITE main
`}},
	{[]string{"go"}, clientSetting{"go", "", `export GOPROXY=ORIGIN/api/REMOTE
`}},
	{[]string{"maven"}, clientSetting{"Maven", "~/.m2/settings.xml", `<settings><mirrors><mirror>
  <id>REMOTE</id><mirrorOf>*</mirrorOf><url>ORIGIN/api/REMOTE</url>
</mirror></mirrors></settings>
`}},
	{[]string{"helm"}, clientSetting{"helm", "", `helm repo add REMOTE ORIGIN/api/REMOTE
`}},
	{[]string{"pypi"}, clientSetting{"pip", "/etc/pip.conf", `[global]
index-url = ORIGIN/api/REMOTE/simple/
trusted-host = HOST HTTP-ONLY
`}},
	{[]string{"npm"}, clientSetting{"npm, yarn, pnpm", ".npmrc", `registry=ORIGIN/api/REMOTE/
`}},
	{[]string{"cargo"}, clientSetting{"cargo", ".cargo/config.toml", `[source.crates-io]
replace-with = "REMOTE"

[source.REMOTE]
registry = "sparse+ORIGIN/api/REMOTE/"
`}},
	{[]string{"terraform"}, clientSetting{"terraform, tofu", "~/.terraformrc", `host "registry.terraform.io" {
  services = { "providers.v1" = "ORIGIN/api/REMOTE/v1/providers/" }
}
`}},
	{[]string{"docker"}, clientSetting{"containerd", "/etc/containerd/certs.d/REGISTRY/hosts.toml", `[host."ORIGIN/REMOTE"]
  capabilities = ["pull", "resolve"]
`}},
	{[]string{"docker"}, clientSetting{"RKE2, k3s", "/etc/rancher/rke2/registries.yaml", `mirrors:
  REGISTRY:
    endpoint: ["ORIGIN"]
    rewrite:
      "^(.*)$": "REMOTE/$1"
`}},
	{[]string{"docker"}, clientSetting{"Docker", "/etc/docker/daemon.json", `{
  "insecure-registries": ["HOST"], HTTP-ONLY
  "registry-mirrors": ["ORIGIN/REMOTE"]
}
`}},
	{[]string{"docker"}, clientSetting{"podman, skopeo, buildah", "/etc/containers/registries.conf.d/REMOTE.conf", `[[registry]]
prefix = "REGISTRY"
location = "REGISTRY"

[[registry.mirror]]
location = "HOST/REMOTE"
insecure = true HTTP-ONLY
`}},
	{[]string{"docker"}, clientSetting{"any client, by name", "", `docker pull HOST/REMOTE/IMAGE:TAG
`}},
	{nil, clientSetting{"curl", "", `curl -fLO ORIGIN/api/REMOTE/PATH
`}},
}

// clientSettingsOf returns the settings for a remote, for clients that reach us at
// origin.
func clientSettingsOf(rem *remote, origin *url.URL) (list []clientSetting) {
	fill := strings.NewReplacer("ORIGIN", origin.String(), "HOST", origin.Host, "REMOTE", rem.name, "REGISTRY", cmp.Or(rem.masked["registry"], rem.registry))
	for _, s := range clientSettings {
		if !slices.Contains(s.packages, rem.packageType) && (s.packages != nil || rem.packageType == "docker") {
			continue
		}
		var lines []string
		for line := range strings.Lines(s.Text) {
			line, httpOnly := strings.CutSuffix(strings.TrimSuffix(line, "\n"), " HTTP-ONLY")
			if !httpOnly || origin.Scheme == "http" {
				lines = append(lines, line)
			}
		}
		list = append(list, clientSetting{s.Client, fill.Replace(s.File), fill.Replace(strings.Join(lines, "\n"))})
	}
	return list
}
