// api_images.go: what belongs to an image, for a prefetch run: its tags, manifests,
// blobs and referrers.

package main

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"net/http"
	"path"
	"slices"
	"strings"
)

// imageOfManifest returns the image whose manifest a file is, or "" if it is none.
func imageOfManifest(file fileRequest) string {
	if image, ok := strings.CutSuffix(path.Dir(file.path), "/manifests"); ok && file.remote.packageType == "docker" {
		return image
	}
	return ""
}

// readManifest fetches a manifest, and adds what it names and what refers to it.
func (p *prefetchFinder) readManifest(j job) {
	var text bytes.Buffer
	rec := p.fetch(j, &text, true)
	if rec == nil {
		return
	}
	file, _ := p.findFile(j.way) // fetch has found it
	image := imageOfManifest(file)
	var m imageDocument
	if err := json.Unmarshal(text.Bytes(), &m); err != nil {
		p.fail(file.remote.name, file.path, &problem{status: http.StatusBadGateway, detail: "this manifest is not valid JSON", cause: err})
		return
	}
	for _, part := range m.Manifests {
		if p.wantsPlatform(part) {
			p.addPart(file.remote, image+"/manifests/", part)
		}
	}
	if m.Config.Digest != "" {
		m.Layers = append(m.Layers, m.Config)
	}
	for _, part := range m.Layers {
		if len(part.URLs) == 0 {
			p.addPart(file.remote, image+"/blobs/", part)
		}
	}
	way := file.remote.urlPath() + image + "/referrers/" + cmp.Or(rec.Digest, "sha256:"+rec.SHA256)
	if _, err := p.findFile(way); errors.Is(err, errDenied) {
		return // patterns may well allow an image without its signatures
	}
	p.failIndex(file.remote, way, p.readPages(way, func(list *imageDocument) {
		for _, part := range list.Manifests {
			p.addPart(file.remote, image+"/manifests/", part)
		}
	}))
}

// addPart adds a manifest or a blob.
func (p *prefetchFinder) addPart(r *remote, folder string, part imagePart) {
	path := folder + part.Digest
	p.addFound(wantedFile{r.name, path, r.urlPath() + path, nil}, part.Size)
}

// wantsPlatform reports whether the run is about the platform of a manifest. Where an
// index says no platform there is nothing to choose by.
func (p *prefetchFinder) wantsPlatform(part imagePart) bool {
	at := part.Platform
	return len(p.platforms) == 0 || at == nil || slices.ContainsFunc(p.platforms, func(s string) bool {
		name := at.OS + "/" + at.Architecture
		return s == name || s == name+"/"+at.Variant
	})
}

// findTags finds the tags of the image prefix.
func (p *prefetchFinder) findTags() {
	image := p.remote.urlPath() + p.prefix
	p.failIndex(p.remote, image+"tags/list", p.readPages(image+"tags/list", func(list *imageDocument) {
		for _, tag := range list.Tags {
			p.addMatching(image+"manifests/"+tag, "")
		}
	}))
}

// readPages reads a list at a path here, page by page.
func (p *prefetchFinder) readPages(way string, read func(list *imageDocument)) error {
	query := ""
	for range maxIndexPages {
		reply, err := p.openIndex(p.findFile(way + query))
		if err != nil {
			return err
		}
		var list imageDocument
		err = json.NewDecoder(reply.body).Decode(&list)
		reply.body.Close()
		if err != nil {
			return newDamagedError(err)
		}
		read(&list)
		if reply.rec.Link == "" {
			return nil
		}
		query = "?" + reply.rec.Link
	}
	return newProblem(http.StatusBadGateway, "this list has more than %d pages", maxIndexPages)
}
