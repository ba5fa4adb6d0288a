module artifactapi

go 1.26
