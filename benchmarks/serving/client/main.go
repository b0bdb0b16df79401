// The load of the serving benchmark: closed loop for rates, open loop for latencies and overload. One JSON line out.
//
// Open loop: requests fall due at even times whatever the server does, and a latency counts from when its request was
// due, so that a stalled server cannot hide (coordinated omission).
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"math"
	"os"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// A caller sends one request over its own connection and says what came back (HTTP status, or gRPC code + 1000).
type caller interface {
	call(body []byte) (status int, err error)
	close()
}

type record struct {
	at      time.Duration // when it was due, since the measurement began; below 0: before, and answered after
	took    time.Duration
	behind  time.Duration // how late it was sent: the client's own doing, or for want of a free connection
	status  int
	failure bool
}

type latencies struct {
	Count int     `json:"count"`
	P50   float64 `json:"p50_ms"`
	P90   float64 `json:"p90_ms"`
	P99   float64 `json:"p99_ms"`
	P999  float64 `json:"p999_ms"`
	Max   float64 `json:"max_ms"`
}

// Turned away at once: HTTP's 429 and 503, gRPC's RESOURCE_EXHAUSTED and UNAVAILABLE. A 504 is a request that ran late.
var refusals = map[int]bool{429: true, 503: true, 1008: true, 1014: true}

type result struct {
	Seconds   float64        `json:"seconds"`
	Due       int            `json:"due"`
	Good      int            `json:"good"`
	GoodRate  float64        `json:"good_rps"`
	Late      int            `json:"late"`
	Failures  int            `json:"failures"`
	Failure   string         `json:"failure,omitempty"`
	Statuses  map[string]int `json:"statuses"`
	Answered  latencies      `json:"answered"`
	Refused   latencies      `json:"refused"`
	Behind    latencies      `json:"sent_behind"`
	GoodEach  []int          `json:"good_each_second"`
	ClientCPU float64        `json:"client_cpu_s"`
}

func main() {
	protocol := flag.String("protocol", "http", "http or grpc")
	address := flag.String("address", "", "host:port")
	path := flag.String("path", "", "of the route or the gRPC method")
	bodies := flag.String("bodies", "", "file: a JSON list of base64 bodies, sent in turn")
	headers := flag.String("headers", "", "more head lines, each ended by \\r\\n (http)")
	connections := flag.Int("connections", 16, "each with one request at a time")
	rate := flag.Float64("rate", 0, "requests a second, open loop; 0: closed loop")
	seconds := flag.Float64("seconds", 5, "measured")
	warm := flag.Float64("warm", 0, "seconds before, not counted")
	inTime := flag.Float64("in-time-ms", math.Inf(1), "good answers come within so long")
	timeout := flag.Duration("timeout", 10*time.Second, "of one request")
	flag.Parse()
	if err := run(*protocol, *address, *path, *bodies, *headers, *connections, *rate, *seconds, *warm, *inTime, *timeout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(protocol, address, path, bodiesFile, headers string, connections int, rate, seconds, warm, inTime float64,
	timeout time.Duration) error {
	raw, err := os.ReadFile(bodiesFile)
	if err != nil {
		return err
	}
	var bodies [][]byte
	if err := json.Unmarshal(raw, &bodies); err != nil {
		return err
	}
	if len(bodies) == 0 {
		return fmt.Errorf("%s has no bodies", bodiesFile)
	}
	open := func() (caller, error) { return newHTTP(address, path, headers, timeout), nil }
	if protocol == "grpc" {
		open = func() (caller, error) { return newGRPC(address, path, timeout) }
	} else if protocol != "http" {
		return fmt.Errorf("unknown protocol %q", protocol)
	}
	callers := make([]caller, connections)
	for number := range callers {
		if callers[number], err = open(); err != nil {
			return err
		}
	}
	total := time.Duration((warm + seconds) * float64(time.Second))
	from := time.Duration(warm * float64(time.Second))
	var next atomic.Int64
	var failure atomic.Value
	found := make([][]record, connections)
	begun := time.Now()
	var done sync.WaitGroup
	for number := range callers {
		done.Add(1)
		go func() {
			defer done.Done()
			kept := make([]record, 0, 1<<14)
			for {
				turn := next.Add(1) - 1
				due := time.Since(begun)
				if rate > 0 {
					due = time.Duration(float64(turn) / rate * float64(time.Second))
				}
				if due >= total {
					break
				}
				if wait := due - time.Since(begun); wait > 0 {
					time.Sleep(wait)
				}
				behind := time.Since(begun) - due
				status, err := callers[number].call(bodies[turn%int64(len(bodies))])
				if err != nil {
					failure.CompareAndSwap(nil, err.Error())
				}
				if took := time.Since(begun) - due; due+took >= from {
					kept = append(kept, record{due - from, took, behind, status, err != nil})
				}
			}
			found[number] = kept
		}()
	}
	done.Wait()
	for _, one := range callers {
		one.close()
	}
	answer := summarise(found, seconds, inTime)
	if text, ok := failure.Load().(string); ok {
		answer.Failure = text
	}
	answer.ClientCPU = cpuSeconds()
	return json.NewEncoder(os.Stdout).Encode(answer)
}

func summarise(found [][]record, seconds, inTime float64) result {
	answer := result{Seconds: seconds, Statuses: map[string]int{}, GoodEach: make([]int, int(math.Ceil(seconds)))}
	var good, refused, behind []float64
	for _, records := range found {
		for _, one := range records {
			if one.at >= 0 {
				answer.Due++
				behind = append(behind, float64(one.behind)/float64(time.Millisecond))
			}
			if one.failure {
				answer.Failures++
				continue
			}
			answer.Statuses[fmt.Sprint(one.status)]++
			// Rates are of what was answered in the time, whenever it was due; latencies of what was due in it.
			ms := float64(one.took) / float64(time.Millisecond)
			if one.status != 200 && one.status != 1000 {
				if one.at >= 0 && refusals[one.status] {
					refused = append(refused, ms)
				}
				continue
			}
			if one.at >= 0 {
				good = append(good, ms)
			}
			if ms > inTime {
				answer.Late++
				continue
			}
			if second := int((one.at + one.took) / time.Second); second < len(answer.GoodEach) {
				answer.Good++
				answer.GoodEach[second]++
			}
		}
	}
	answer.GoodRate = float64(answer.Good) / seconds
	answer.Answered, answer.Refused, answer.Behind = describe(good), describe(refused), describe(behind)
	return answer
}

func describe(found []float64) latencies {
	if len(found) == 0 {
		return latencies{}
	}
	sort.Float64s(found)
	at := func(share float64) float64 { return found[min(len(found)-1, int(share*float64(len(found))))] }
	return latencies{len(found), at(0.5), at(0.9), at(0.99), at(0.999), found[len(found)-1]}
}
