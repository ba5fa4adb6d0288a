-- The schema, see makeSchema in store_pq.go. Somebody may have emptied or dropped some of
-- its tables.

DO $$ BEGIN
	IF to_regclass('artifactapi_files') IS NOT NULL THEN
		LOCK TABLE artifactapi_files NOWAIT; -- a restore that is filling it has it
		IF EXISTS (SELECT FROM artifactapi_files) THEN
			RAISE EXCEPTION 'artifactapi_files has rows, and artifactapi_schema does not say of which version: wait for the end of a restore, or drop both and run artifactapi reindex';
		END IF;
	END IF;
END $$;
DROP TABLE IF EXISTS artifactapi_schema, artifactapi_files, artifactapi_totals;
DROP FUNCTION IF EXISTS artifactapi_count();

CREATE TABLE artifactapi_schema (version integer NOT NULL);
INSERT INTO artifactapi_schema VALUES (1);
CREATE TABLE artifactapi_files (
	key text COLLATE "C" PRIMARY KEY,
	remote text COLLATE "C" NOT NULL,
	path text COLLATE "C" NOT NULL,
	spelling text NOT NULL,
	sha256 text NOT NULL,
	content_type text NOT NULL,
	class text NOT NULL,
	size bigint NOT NULL,
	hits bigint NOT NULL,
	fetched_at timestamptz NOT NULL,
	last_access timestamptz NOT NULL
);
COMMENT ON COLUMN artifactapi_files.path IS 'decoded: what listings sort and choose by, in byte order';
CREATE INDEX artifactapi_files_by_path ON artifactapi_files (remote, path, key);
CREATE INDEX artifactapi_files_by_remote_age ON artifactapi_files (remote, last_access, key);
-- The conditions are sqlIsUnused and sqlIsUsed in store_sql.go.
CREATE INDEX artifactapi_files_unused ON artifactapi_files (last_access, key) WHERE hits = 0 AND class <> 'local';
CREATE INDEX artifactapi_files_used ON artifactapi_files (last_access, key) WHERE hits > 0 AND class <> 'local';

CREATE TABLE artifactapi_totals (
	remote text COLLATE "C" NOT NULL,
	slot integer NOT NULL,
	files bigint NOT NULL,
	bytes bigint NOT NULL,
	PRIMARY KEY (remote, slot)
);
CREATE FUNCTION artifactapi_count() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
	f artifactapi_files%ROWTYPE;
	n bigint := 0;
	b bigint := 0;
BEGIN
	IF TG_OP <> 'INSERT' THEN f := OLD; n := n - 1; b := b - OLD.size; END IF;
	IF TG_OP <> 'DELETE' THEN f := NEW; n := n + 1; b := b + NEW.size; END IF;
	IF n <> 0 OR b <> 0 THEN
		INSERT INTO artifactapi_totals AS t (remote, slot, files, bytes)
		VALUES (f.remote, hashtext(f.key) & 15, n, b)
		ON CONFLICT (remote, slot) DO UPDATE
		SET files = t.files + excluded.files, bytes = t.bytes + excluded.bytes;
	END IF;
	RETURN NULL;
END $$;
CREATE TRIGGER artifactapi_count AFTER INSERT OR DELETE OR UPDATE OF size
ON artifactapi_files FOR EACH ROW EXECUTE FUNCTION artifactapi_count();
