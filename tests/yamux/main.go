// The far side of the interop tests in tunnel-core/src/mux/interop.rs: hashicorp/yamux over one TCP connection on
// loopback.
//
// It accepts streams and does what each one's first byte says. With --streams it also opens as many itself, writes a
// pattern, half-closes, and compares what comes back; the result is a line on standard output.
package main

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

func main() {
	dial := flag.String("dial", "", "address to connect to")
	listen := flag.Bool("listen", false, "take one connection on loopback; its address is the first line of output")
	streams := flag.Int("streams", 0, "streams to open at once")
	size := flag.Int("bytes", 0, "bytes to write to each")
	window := flag.Uint("window", 256*1024, "receive window of each stream")
	keepalive := flag.Duration("keepalive", 100*time.Millisecond, "between two pings")
	closing := flag.Duration("close-timeout", 5*time.Minute, "of a stream that is half-closed; then it is reset")
	flag.Parse()

	connection := connect(*dial, *listen)
	config := yamux.DefaultConfig()
	config.MaxStreamWindowSize = uint32(*window)
	config.KeepAliveInterval = *keepalive
	config.StreamCloseTimeout = *closing
	config.LogOutput = os.Stderr
	start := yamux.Server
	if *dial != "" {
		start = yamux.Client
	}
	session, err := start(connection, config)
	check(err)
	go openAll(session, *streams, *size)
	for {
		stream, err := session.AcceptStream()
		if err != nil {
			fmt.Println("ended")
			return
		}
		go serve(session, stream)
	}
}

func connect(dial string, listen bool) net.Conn {
	if !listen {
		connection, err := net.Dial("tcp", dial)
		check(err)
		return connection
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	fmt.Println(listener.Addr())
	connection, err := listener.Accept()
	check(err)
	return connection
}

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// serve does what the first byte of a stream says.
func serve(session *yamux.Session, stream *yamux.Stream) {
	defer stream.Close()
	var what [1]byte
	if _, err := io.ReadFull(stream, what[:]); err != nil {
		return
	}
	switch what[0] {
	case 'e': // echo to the end
		io.Copy(stream, stream)
	case 'h': // read to the end, then the number of bytes and their hash
		hash := sha256.New()
		count, _ := io.Copy(hash, stream)
		binary.Write(stream, binary.BigEndian, uint64(count))
		stream.Write(hash.Sum(nil))
	case 'f': // half-close first, then read to the end; what came is a line of output
		stream.Close()
		count, _ := io.Copy(io.Discard, stream)
		fmt.Println("read", count)
	case 's': // never read until told on another stream
		<-release
		count, _ := io.Copy(io.Discard, stream)
		fmt.Println("read", count)
	case 'r':
		close(release)
	case 'w': // what a reader is told
		_, err := io.Copy(io.Discard, stream)
		fmt.Println("reset", errors.Is(err, yamux.ErrConnectionReset))
	case 'x': // half-close; the close time-out then resets it
	case 'p': // the round trip
		_, err := session.Ping()
		fmt.Fprint(stream, err == nil)
	case 'g': // go away
		session.GoAway()
	case 'c': // close it all
		session.Close()
	}
}

var release = make(chan struct{})

// openAll opens streams, all of them before any is written to.
func openAll(session *yamux.Session, streams, size int) {
	if streams == 0 {
		return
	}
	var group sync.WaitGroup
	failures := make(chan error, streams)
	for number := range streams {
		group.Add(1)
		go func() {
			defer group.Done()
			if err := exchange(session, number, size); err != nil {
				failures <- fmt.Errorf("stream %d: %w", number, err)
			}
		}()
	}
	group.Wait()
	select {
	case err := <-failures:
		fmt.Println("failed:", err)
	default:
		fmt.Println("exchanged", streams)
	}
}

// exchange writes a pattern and half-closes; all of it must come back, then an end.
func exchange(session *yamux.Session, number, size int) error {
	stream, err := session.OpenStream()
	if err != nil {
		return err
	}
	defer stream.Close()
	pattern := make([]byte, size)
	for i := range pattern {
		pattern[i] = byte(i*31 ^ i>>10 ^ number*7)
	}
	go func() {
		stream.Write(pattern)
		stream.Close()
	}()
	back, err := io.ReadAll(stream)
	if err != nil {
		return err
	}
	if !bytes.Equal(back, pattern) {
		return fmt.Errorf("%d bytes came back, of %d, or others", len(back), size)
	}
	return nil
}
