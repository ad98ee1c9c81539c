// A Go program: goroutines, channels, a heap that is checked whole, memory given back to the system and taken anew.
//
//	heap DIRECTORY
//
// The trap: freed spans go back by MADV_DONTNEED (GODEBUG=madvdontneed=1) and the runtime trusts that they come back
// as zeros. Every fresh slice is checked for zeros before it is used, every kept one for its content.
package main

import (
	"fmt"
	"hash/crc64"
	"math/rand"
	"os"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"time"
)

var table = crc64.MakeTable(crc64.ISO)

func bad(format string, arguments ...interface{}) {
	fmt.Printf("BAD "+format+"\n", arguments...)
	os.Exit(1)
}

type block struct {
	data []byte
	sum  uint64
}

func fresh(random *rand.Rand, size int) *block {
	data := make([]byte, size)
	for i, value := range data {
		if value != 0 {
			bad("fresh memory holds %#x at %d of %d", value, i, size)
		}
	}
	random.Read(data)
	return &block{data, crc64.Checksum(data, table)}
}

func exists(name string) bool {
	_, err := os.Stat(name)
	return err == nil
}

// churn allocates and drops blocks, and checks each one it drops.
func churn(number int, stop func() bool, done *sync.WaitGroup, rounds *[4]int) {
	defer done.Done()
	random := rand.New(rand.NewSource(int64(number)))
	blocks := make([]*block, 400)
	for !stop() {
		for step := 0; step < 200; step++ {
			at := random.Intn(len(blocks))
			if old := blocks[at]; old != nil && crc64.Checksum(old.data, table) != old.sum {
				bad("a block of %d bytes changed", len(old.data))
			}
			blocks[at] = nil
			if random.Intn(3) > 0 {
				blocks[at] = fresh(random, 1+random.Intn(20000))
			}
		}
		if random.Intn(10) == 0 {
			fresh(random, 4<<20)
			debug.FreeOSMemory()
		}
		rounds[number]++
	}
	for _, one := range blocks {
		if one != nil && crc64.Checksum(one.data, table) != one.sum {
			bad("a block of %d bytes changed", len(one.data))
		}
	}
}

func main() {
	directory := os.Args[1]
	runtime.GOMAXPROCS(2)
	mark := "none"
	var after int
	stop := func() bool {
		if exists(directory + "/go") {
			after++
		} else if exists(directory + "/calm") {
			time.Sleep(100 * time.Millisecond)
		}
		return after > 40
	}
	var done sync.WaitGroup
	var rounds [4]int
	for number := 0; number < 4; number++ {
		done.Add(1)
		go churn(number, stop, &done, &rounds)
	}
	// a thousand goroutines in a ring pass a number round
	first := make(chan int)
	from := first
	for i := 0; i < 1000; i++ {
		to := make(chan int)
		go func(from, to chan int) {
			for value := range from {
				to <- value + 1
			}
		}(from, to)
		from = to
	}
	var turns int
	go func(last chan int) {
		value := 0
		for {
			first <- value
			got := <-last
			if got != value+1000 {
				bad("the ring gave %d after %d", got, value)
			}
			value = got
			turns++
			if exists(directory + "/calm") {
				time.Sleep(10 * time.Millisecond)
			}
		}
	}(from)
	ticker := time.NewTicker(10 * time.Millisecond)
	for rounds[0] < 3 || turns < 3 {
		<-ticker.C
	}
	fmt.Println("READY")
	go func() {
		for {
			<-ticker.C
			if text, err := os.ReadFile(directory + "/mark"); err == nil && len(text) > 0 {
				word := strings.TrimSpace(string(text))
				if word != mark {
					mark = word
					os.WriteFile(directory+"/seen", []byte(mark+"\n"), 0644)
				}
			}
		}
	}()
	before := turns
	done.Wait()
	if turns <= before {
		bad("the ring stands still")
	}
	fmt.Println("MARK", mark)
	fmt.Println("OK")
}
