//go:build ignore

// Origin is what .ci/run needs and no fresh machine surely has beside Go: it
// serves a directory on a free port of loopback and prints the address, or,
// asked with "ports N", prints N free ports.
package main

import (
	"fmt"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
)

func main() {
	if len(os.Args) == 3 && os.Args[1] == "ports" {
		n, err := strconv.Atoi(os.Args[2])
		if err != nil {
			log.Fatal(err)
		}
		printPorts(n)
		return
	}
	if len(os.Args) != 2 {
		log.Fatal("usage: origin DIR | origin ports N")
	}
	l := listen()
	fmt.Println(l.Addr())
	log.Fatal(http.Serve(l, http.FileServer(http.Dir(os.Args[1]))))
}

// printPorts holds all listeners until the end, so that no port comes twice.
func printPorts(n int) {
	for range n {
		l := listen()
		defer l.Close()
		fmt.Print(l.Addr().(*net.TCPAddr).Port, " ")
	}
	fmt.Println()
}

func listen() net.Listener {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		log.Fatal(err)
	}
	return l
}
