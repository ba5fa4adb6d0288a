// api_images.go: what belongs to an image, for a prefetch run: manifests, blobs
// and referrers.

package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"slices"
	"strings"
)

// imageManifest holds what a manifest, an index or a list of referrers names.
type imageManifest struct {
	Config    *imagePart  `json:"config"`
	Layers    []imagePart `json:"layers"`
	Manifests []imagePart `json:"manifests"`
}

// imagePart is a descriptor (OCI image specification).
type imagePart struct {
	Digest   string   `json:"digest"`
	Size     int64    `json:"size"`
	URLs     []string `json:"urls"` // of a layer that registries do not have themselves
	Platform *struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
	} `json:"platform"`
}

// imageOfManifest returns the image whose manifest a file is, or "" if it is none.
func imageOfManifest(file fileRequest) string {
	image, _, ok := cutLast(file.path, "/manifests/")
	if !ok || file.remote.packageType != "docker" {
		return ""
	}
	return image
}

// cutLast is strings.Cut at the last sep.
func cutLast(s, sep string) (before, after string, found bool) {
	if i := strings.LastIndex(s, sep); i >= 0 {
		return s[:i], s[i+len(sep):], true
	}
	return s, "", false
}

// addParts adds what the manifest of an image names, and what refers to it.
func (p *prefetchRun) addParts(file fileRequest, image string, text []byte) {
	_, reference, _ := cutLast(file.path, "/manifests/")
	sum := sha256.Sum256(text)
	digest := "sha256:" + hex.EncodeToString(sum[:])
	if strings.Contains(reference, ":") {
		digest = reference
	}
	var m imageManifest
	if err := json.Unmarshal(text, &m); err != nil {
		p.fail(file.remote.name, file.path, &problem{status: http.StatusBadGateway, detail: "this manifest is not valid JSON", cause: err})
		return
	}
	for _, part := range m.Manifests {
		if p.wantsPlatform(part) {
			p.addPart(file.remote, image+"/manifests/", part)
		}
	}
	if m.Config != nil {
		m.Layers = append(m.Layers, *m.Config)
	}
	for _, part := range m.Layers {
		if len(part.URLs) == 0 {
			p.addPart(file.remote, image+"/blobs/", part)
		}
	}
	p.addReferrers(file.remote, image, digest)
}

// addReferrers adds the manifests that refer to one, such as signatures. Patterns may
// well allow an image without them.
func (p *prefetchRun) addReferrers(r *remote, image, digest string) {
	var text bytes.Buffer
	path := image + "/referrers/" + digest
	file, err := p.findFile(r.urlPath() + path)
	if err == nil {
		_, _, err = prefetch(p.ctx, p.api.cache, file, &text, true)
	}
	var list imageManifest
	if err == nil {
		err = json.Unmarshal(text.Bytes(), &list)
	}
	if err != nil && !errors.Is(err, errDenied) {
		p.fail(r.name, path, err)
	}
	for _, part := range list.Manifests {
		p.addPart(r, image+"/manifests/", part)
	}
}

// addPart adds a manifest or a blob of a remote.
func (p *prefetchRun) addPart(r *remote, folder string, part imagePart) {
	way := r.urlPath() + folder + part.Digest
	file, err := p.findFile(way)
	if err == nil {
		err = p.jobs.push(file.key(), job{way, part.Size})
	}
	if err != nil {
		p.fail(r.name, folder+part.Digest, err)
	}
}

// wantsPlatform reports whether the run is about the platform of a manifest. Where an
// index says no platform there is nothing to choose by.
func (p *prefetchRun) wantsPlatform(part imagePart) bool {
	at := part.Platform
	return len(p.platforms) == 0 || at == nil || slices.ContainsFunc(p.platforms, func(s string) bool {
		name := at.OS + "/" + at.Architecture
		return s == name || s == name+"/"+at.Variant
	})
}
