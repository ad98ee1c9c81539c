// An HTTP server with state in memory, timers, a worker thread, a child process and a file it appends to.
// Verifies itself all the time: timers must neither be lost nor fire early. node server.js DIRECTORY
'use strict';
const fs = require('fs');
const http = require('http');
const crypto = require('crypto');
const { Worker, isMainThread, parentPort, workerData } = require('worker_threads');
const { spawn } = require('child_process');

if (!isMainThread) {
  let count = 0;
  const data = crypto.randomBytes(1 << 20);
  const digest = crypto.createHash('sha256').update(data).digest('hex');
  setInterval(() => {
    count++;
    const again = crypto.createHash('sha256').update(data).digest('hex');
    parentPort.postMessage({ count, good: again === digest });
  }, 20);
  return;
}

const directory = process.argv[2];
const bad = (text) => { console.log('BAD ' + text); process.exit(1); };
const state = { mark: 'none', ticks: 0, worker: 0, echoed: 0, requests: 0, late: 0 };

const worker = new Worker(__filename, { workerData: {} });
worker.on('message', ({ count, good }) => {
  if (!good || count !== state.worker + 1) bad(`worker: ${count} after ${state.worker}, ${good}`);
  state.worker = count;
});

setInterval(() => { state.ticks++; }, 10);

function early(ms) { // a chain of timers of all lengths: none may fire early
  const due = performance.now() + ms;
  setTimeout(() => {
    if (performance.now() < due - 2) bad(`a timer of ${ms} ms fired ${due - performance.now()} ms early`);
    state.late++;
    early((ms * 7919) % 977 + 1);
  }, ms);
}
for (let i = 1; i <= 20; i++) early(i * 37);

const cat = spawn('cat');
let sent = 0;
let tail = '';
cat.stdout.on('data', (chunk) => {
  tail += chunk;
  const lines = tail.split('\n');
  tail = lines.pop();
  for (const line of lines) if (Number(line) !== state.echoed++) bad(`cat said ${line}, not ${state.echoed - 1}`);
});
setInterval(() => { cat.stdin.write(`${sent++}\n`); }, 5);

const heap = new Map(); // objects with sums of their own, replaced all the time
setInterval(() => {
  for (let i = 0; i < 200; i++) {
    const key = Math.floor(Math.random() * 5000);
    const old = heap.get(key);
    if (old && old.sum !== old.items.reduce((a, b) => a + b, 0)) bad(`object ${key}`);
    const items = Array.from({ length: 20 }, () => Math.floor(Math.random() * 1000));
    heap.set(key, { items, sum: items.reduce((a, b) => a + b, 0) });
  }
}, 20);

let written = 0;
const log = fs.createWriteStream(directory + '/appended');
setInterval(() => { log.write(`${written++}\n`); }, 10);

http.createServer((request, response) => {
  state.requests++;
  if (request.method === 'POST') {
    let body = '';
    request.on('data', (chunk) => { body += chunk; });
    request.on('end', () => {
      state.mark = body;
      fs.writeFileSync(directory + '/mark', body);
      response.end('stored');
    });
    return;
  }
  if (request.url === '/slow') { // an answer that takes its time, a piece each 100 ms
    let piece = 0;
    const timer = setInterval(() => {
      response.write(`piece ${piece++}\n`);
      if (piece === 50) { clearInterval(timer); response.end(); }
    }, 100);
    return;
  }
  response.end(JSON.stringify({ ...state, heap: heap.size, pid: process.pid }));
}).listen(8081, '127.0.0.1', () => console.log('LISTENING'));
