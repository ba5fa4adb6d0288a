package main

const childMark = "ARTIFACTAPI_TEST_CHILD"

func childMain() int { return 0 }
