// registry_body.go: what the registry reads of manifests and lists. They are read as
// streams: a hostile one has millions of members.

package main

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"mime"
	"strings"
)

// maxNamedBlobs bounds how many blobs of a manifest are known to belong to its image.
// Docker's images have 127 layers at most. The upstream is asked about others.
const maxNamedBlobs = 1000

// manifest is what the registry reads of a manifest or an index.
type manifest struct {
	declared  string       // its member mediaType
	suggested string       // the type that its other members suggest
	blobs     []descriptor // the first of those that it names
}

// descriptor refers to a blob (OCI image specification).
type descriptor struct {
	Digest string `json:"digest"`
	Size   int64  `json:"size"`
}

// readManifest reads a manifest or an index. With an error, which means that it is neither,
// the manifest is empty, or is what was read of one that has no schemaVersion.
func readManifest(r io.Reader) (*manifest, error) {
	m, isManifest := &manifest{}, false
	err := readObject(r, func(d *json.Decoder, name string) error {
		switch name {
		case "schemaVersion":
			isManifest = true
		case "mediaType":
			return decodeNext(d, &m.declared)
		case "config":
			m.suggested = cmp.Or(m.suggested, typeManifest)
			return m.readBlob(d)
		case "layers":
			return readArray(d, func() error { return m.readBlob(d) })
		case "manifests":
			m.suggested = typeIndex
		}
		return skipNext(d)
	})
	if err != nil {
		m = &manifest{}
	} else if !isManifest {
		err = errors.New("no schemaVersion")
	}
	return m, err
}

// readBlob reads the descriptor of a blob that m names.
func (m *manifest) readBlob(d *json.Decoder) error {
	if len(m.blobs) == maxNamedBlobs {
		return skipNext(d)
	}
	var b descriptor
	err := decodeNext(d, &b)
	if isDigest(b.Digest) {
		m.blobs = append(m.blobs, b)
	}
	return err
}

// mediaType returns a manifest's type: the upstream's if that is specific, else the
// type that the manifest declares, else the one that its members suggest. What is declared
// is text of the body, which may hold what no header can: parameters are left out.
func (m *manifest) mediaType(upstream string) string {
	if strings.HasPrefix(upstream, "application/vnd.") {
		return upstream
	}
	declared, _, err := mime.ParseMediaType(m.declared)
	if err != nil {
		declared = ""
	}
	return cmp.Or(boundedHeader(declared), m.suggested, upstream, typeJSON)
}

// countList returns how many elements the member of that name has, an array, or null. An
// error means that there is no such list.
func countList(r io.Reader, member string) (n int, err error) {
	found := false
	err = readObject(r, func(d *json.Decoder, name string) error {
		if name != member {
			return skipNext(d)
		}
		found = true
		return readArray(d, func() error { n++; return skipNext(d) })
	})
	if err == nil && !found {
		err = errors.New("no list")
	}
	return n, err
}

// readObject reads a JSON object that is all there is in r. It calls member at the value
// of each of its members, which member reads.
func readObject(r io.Reader, member func(d *json.Decoder, name string) error) error {
	d := json.NewDecoder(r)
	t, err := d.Token()
	if err == nil && t != json.Delim('{') {
		err = errors.New("no object")
	}
	for err == nil && d.More() {
		if t, err = d.Token(); err == nil {
			err = member(d, t.(string))
		}
	}
	if err == nil {
		_, err = d.Token() // the closing brace
	}
	if err != nil {
		return err
	}
	if _, err = d.Token(); err != io.EOF {
		return errors.New("more than an object")
	}
	return nil
}

// readArray calls element at each element of the next value, an array or null.
func readArray(d *json.Decoder, element func() error) error {
	first, err := d.Token()
	if err != nil || first == nil {
		return err
	}
	if first != json.Delim('[') {
		return errors.New("no list")
	}
	for d.More() {
		if err := element(); err != nil {
			return err
		}
	}
	_, err = d.Token() // the closing bracket
	return err
}

// skipNext reads past the next value. encoding/json bounds its nesting.
func skipNext(d *json.Decoder) error { return decodeNext(d, &struct{}{}) }

// decodeNext reads the next value into v, as far as it is of v's type.
func decodeNext(d *json.Decoder, v any) error {
	err := d.Decode(v)
	if _, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
		return nil
	}
	return err
}
