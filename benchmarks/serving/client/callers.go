package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
)

// ---- HTTP/1.1, by hand: net/http costs the client several times as much -------------------------------------------

type httpCaller struct {
	address, head string
	timeout       time.Duration
	connection    net.Conn
	reader        *bufio.Reader
	request       []byte
}

func newHTTP(address, path, headers string, timeout time.Duration) *httpCaller {
	head := "POST " + path + " HTTP/1.1\r\nhost: " + address + "\r\ncontent-type: application/json\r\n" + headers + "content-length: "
	return &httpCaller{address: address, head: head, timeout: timeout}
}

func (c *httpCaller) close() {
	if c.connection != nil {
		c.connection.Close()
		c.connection = nil
	}
}

func (c *httpCaller) call(body []byte) (int, error) {
	if c.connection == nil {
		connection, err := net.DialTimeout("tcp", c.address, c.timeout)
		if err != nil {
			time.Sleep(time.Millisecond) // a server that is gone must not be asked in a tight loop
			return 0, err
		}
		c.connection, c.reader = connection, bufio.NewReaderSize(connection, 16<<10)
	}
	c.connection.SetDeadline(time.Now().Add(c.timeout))
	c.request = append(c.request[:0], c.head...)
	c.request = strconv.AppendInt(c.request, int64(len(body)), 10)
	c.request = append(append(c.request, "\r\n\r\n"...), body...)
	if _, err := c.connection.Write(c.request); err != nil {
		c.close()
		return 0, err
	}
	status, stays, err := c.answer()
	if err != nil || !stays {
		c.close()
	}
	return status, err
}

func (c *httpCaller) answer() (status int, stays bool, err error) {
	line, err := c.reader.ReadSlice('\n')
	if err != nil {
		return 0, false, err
	}
	if len(line) < 12 {
		return 0, false, fmt.Errorf("not a status line: %q", line)
	}
	if status, err = strconv.Atoi(string(line[9:12])); err != nil {
		return 0, false, err
	}
	length, stays := -1, true
	for {
		line, err := c.reader.ReadSlice('\n')
		if err != nil {
			return 0, false, err
		}
		line = bytes.TrimRight(line, "\r\n")
		if len(line) == 0 {
			break
		}
		name, value, _ := bytes.Cut(line, []byte(":"))
		value = bytes.TrimSpace(value)
		switch {
		case bytes.EqualFold(name, []byte("content-length")):
			if length, err = strconv.Atoi(string(value)); err != nil {
				return 0, false, err
			}
		case bytes.EqualFold(name, []byte("connection")) && bytes.EqualFold(value, []byte("close")):
			stays = false
		}
	}
	if length < 0 {
		return 0, false, errors.New("an answer without a content length")
	}
	_, err = io.CopyN(io.Discard, c.reader, int64(length))
	return status, stays, err
}

// ---- gRPC, unary: bodies are messages made beforehand -------------------------------------------------------------

type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(value any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(value.([]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, value any) error {
	*value.(*int) = data.Len()
	return nil
}

type grpcCaller struct {
	connection *grpc.ClientConn
	method     string
	timeout    time.Duration
}

func newGRPC(address, method string, timeout time.Duration) (*grpcCaller, error) {
	connection, err := grpc.NewClient("passthrough:///"+address, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodecV2(rawCodec{})))
	if err != nil {
		return nil, err
	}
	return &grpcCaller{connection, method, timeout}, nil
}

func (c *grpcCaller) call(body []byte) (int, error) {
	limit, cancel := context.WithTimeout(context.Background(), c.timeout)
	defer cancel()
	var length int
	err := c.connection.Invoke(limit, c.method, body, &length)
	if known, ok := status.FromError(err); ok {
		return 1000 + int(known.Code()), nil
	}
	return 0, err
}

func (c *grpcCaller) close() { c.connection.Close() }

func cpuSeconds() float64 {
	var used syscall.Rusage
	syscall.Getrusage(syscall.RUSAGE_SELF, &used)
	return time.Duration(used.Utime.Nano() + used.Stime.Nano()).Seconds()
}
