# The image holds the binary, the CA bundle, remotes.yaml and an empty data
# directory, nothing else. .ci/run reads the go build line and the COPY lines
# from here and runs what they make.

FROM --platform=$BUILDPLATFORM docker.io/library/golang:1.26 AS build
WORKDIR /src
COPY . .
# With vendor/ (go mod vendor) the build asks no network; go build sees it too.
RUN [ -d vendor ] || go mod download
ARG TARGETOS
ARG TARGETARCH
ARG VERSION=dev
RUN CGO_ENABLED=0 GOOS=$TARGETOS GOARCH=$TARGETARCH go build -trimpath -ldflags="-s -w -X main.version=$VERSION" -o /out/artifactapi .
# scratch has no mkdir; COPY of an empty directory makes one.
RUN mkdir -p /out/data

FROM scratch
ARG VERSION=dev
LABEL org.opencontainers.image.title="artifactapi" \
      org.opencontainers.image.description="A cache for artifacts that keeps serving when the upstream is gone" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.licenses="MIT"
COPY --from=build /etc/ssl/certs/ca-certificates.crt /etc/ssl/certs/ca-certificates.crt
COPY --from=build /out/artifactapi /artifactapi
COPY --from=build /src/remotes.yaml /app/remotes.yaml
# Temporary files go beside their target: no /tmp is needed, this must be writable.
COPY --from=build --chown=65532:65532 /out/data /app/data
WORKDIR /app
USER 65532:65532
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=5s CMD ["/artifactapi", "healthcheck"]
ENTRYPOINT ["/artifactapi"]
