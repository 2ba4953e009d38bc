//! Reads, writes and flushes of a raw file through io_uring: many at a time, for files that the page cache does not
//! answer at once.
//!
//! A ring belongs to one queue. Completions signal an eventfd of the queue that its I/O thread waits for as it does for
//! kicks, and whoever serves the queue reaps them; while it looks for work anyway, it looks at the completion queue
//! without a system call.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};

use io_uring::{opcode, squeue, types, IoUring};
use smallvec::SmallVec;

use super::blk::{BlkPlane, Failure, Op};
use super::file::{FileBackend, IOV_MAX};
use super::transfer::skip;
use crate::chain::{Chain, Segment};
use crate::queue::{Handler, VirtQueue};

/// The file, registered with each ring.
const FILE: types::Fixed = types::Fixed(0);

/// None if this host gives us rings, else why it does not.
pub fn io_uring_missing() -> Option<io::Error> {
    IoUring::new(1).err()
}

/// Serves one queue of a disk whose file is read and written through io_uring.
pub struct UringQueue {
    plane: Arc<BlkPlane>,
    file: FileBackend,
    /// Locked while the queue is served, so that `finish` waits for that.
    ring: Mutex<Ring>,
}

impl UringQueue {
    pub fn new(plane: Arc<BlkPlane>, file: FileBackend, vq: &VirtQueue) -> io::Result<Self> {
        let uring = IoUring::new(u32::from(vq.max_size()).max(1))?;
        uring.submitter().register_files(&[file.as_raw_fd()])?;
        uring.submitter().register_eventfd(vq.answer_fd())?;
        Ok(Self { plane, file, ring: Mutex::new(Ring::new(uring, vq.max_size())) })
    }

    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Give a request back. What breaks the device does so before the chain is dropped, which would be another reason.
    fn answer(&self, chain: &mut Chain, result: Result<(), Failure>) -> Result<(), Broken> {
        self.plane.answer(chain, result).map_err(|reason| {
            chain.vq().state().fail(&format!("{}: {reason}", chain.vq().name()));
            Broken
        })
    }

    /// Begin a request, or do it at once if the ring is not for such ones.
    fn begin(&self, ring: &mut Ring, mut chain: Chain) -> Result<(), Broken> {
        let (kind, offset, pieces) = match self.plane.decode(&mut chain) {
            Ok(Op::Read { offset, length }) => (Kind::Read, offset, chain.take_writable(length)),
            Ok(Op::Write { offset, length }) => (Kind::Write, offset, chain.take_readable(length)),
            Ok(Op::Flush) => (Kind::Flush, 0, SmallVec::new()),
            decoded => {
                let result = decoded.and_then(|op| self.plane.execute(&mut chain, op));
                return self.answer(&mut chain, result);
            }
        };
        if ring.free.is_empty() {
            // The queue counts a chain twice that is given back twice, on purpose.
            let size = ring.requests.len();
            let reason = format!("more requests under way than the queue has entries ({size})");
            return self.answer(&mut chain, Err(Failure::Broken(reason)));
        }
        let mut request = Request { chain, kind, offset, done: 0, pieces, next: 0 };
        if kind == Kind::Flush {
            self.plane.counters.flushes.add(1);
            ring.push(request);
            return Ok(());
        }
        if !self.file.takes(&request.pieces) {
            let result = self.plane.transfer(&mut request.chain, &mut request.pieces, offset, kind == Kind::Write);
            return self.answer(&mut request.chain, result);
        }
        match request.advance(&self.plane, 0) {
            Step::Again => ring.push(request),
            Step::Done(result) => return self.answer(&mut request.chain, result),
        }
        Ok(())
    }

    /// Go on with the requests that the kernel has answered.
    fn reap(&self, ring: &mut Ring) -> Result<(), Broken> {
        while let Some((mut request, answer)) = ring.pop() {
            let step = match answer {
                Ok(0) if request.kind != Kind::Flush => Step::Done(Err(Failure::Refused)), // the file ends here
                Ok(done) => request.advance(&self.plane, done),
                Err(error) if is_transient(&error) => Step::Again,
                Err(error) => Step::Done(Err(error.into())),
            };
            match step {
                Step::Again => ring.push(request),
                Step::Done(result) => {
                    if request.kind == Kind::Read {
                        self.plane.has_read(&mut request.chain, request.done);
                    }
                    self.answer(&mut request.chain, result)?;
                }
            }
        }
        Ok(())
    }

    /// Wait for all that was begun.
    fn drain(&self, ring: &mut Ring) -> Result<(), Broken> {
        while ring.in_flight() > 0 {
            ring.submit(1);
            self.reap(ring)?;
        }
        Ok(())
    }

    fn serve(&self, vq: &Arc<VirtQueue>) -> Result<(), Broken> {
        let mut ring = self.ring();
        self.reap(&mut ring)?;
        while let Some(chain) = vq.pop() {
            self.begin(&mut ring, chain)?;
        }
        ring.submit(0);
        if !ring.uring.submission().is_empty() {
            vq.signal(); // the kernel was short of something: again soon
        }
        if !vq.attached() {
            // Nobody polls the eventfd: who notified waits for the answer.
            self.drain(&mut ring)?;
        }
        Ok(())
    }
}

impl Handler for UringQueue {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        // Whoever stops the queue waits for what was begun.
        let _ = self.serve(vq);
    }

    fn has_news(&self) -> bool {
        match self.ring.try_lock() {
            Ok(mut ring) => !ring.uring.completion().is_empty(),
            Err(TryLockError::Poisoned(_)) => false,
            // Whoever serves looks again before it goes.
            Err(TryLockError::WouldBlock) => false,
        }
    }

    fn finish(&self) {
        let mut ring = self.ring();
        while self.drain(&mut ring).is_err() {}
    }
}

/// The device needs a reset, and was told why.
struct Broken;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Read,
    Write,
    Flush,
}

/// A request under way. Its chain keeps the pieces mapped.
struct Request {
    chain: Chain,
    kind: Kind,
    /// Of the request in the file.
    offset: u64,
    /// Bytes read or written so far.
    done: usize,
    /// Where they go; those before `next` are done.
    pieces: SmallVec<[Segment; 4]>,
    next: usize,
}

// SAFETY: the pieces lead to shared guest memory, which any thread may access.
unsafe impl Send for Request {}

enum Step {
    Again,
    Done(Result<(), Failure>),
}

impl Request {
    /// The kernel did `n` bytes more, or was not asked before; what is to be done next.
    fn advance(&mut self, plane: &BlkPlane, n: usize) -> Step {
        let all = self.pieces.len();
        self.done += n;
        self.next = all - skip(&mut self.pieces[self.next..], n).len();
        match self.kind {
            Kind::Read | Kind::Write if self.next < all => Step::Again,
            Kind::Write => self.written(plane),
            Kind::Read | Kind::Flush => Step::Done(Ok(())),
        }
    }

    fn written(&mut self, plane: &BlkPlane) -> Step {
        plane.counters.bytes_written.add(self.done as u64);
        if !plane.is_writethrough() {
            return Step::Done(Ok(()));
        }
        plane.counters.flushes.add(1);
        self.kind = Kind::Flush;
        Step::Again
    }

    fn entry(&self) -> squeue::Entry {
        let rest = &self.pieces[self.next..];
        let at = self.offset + self.done as u64;
        match (self.kind, rest) {
            (Kind::Flush, _) => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            (Kind::Read, [one]) => opcode::Read::new(FILE, one.iov_base.cast(), length(one)).offset(at).build(),
            (Kind::Write, [one]) => opcode::Write::new(FILE, one.iov_base.cast(), length(one)).offset(at).build(),
            (Kind::Read, _) => opcode::Readv::new(FILE, rest.as_ptr(), count(rest)).offset(at).build(),
            (Kind::Write, _) => opcode::Writev::new(FILE, rest.as_ptr(), count(rest)).offset(at).build(),
        }
    }
}

/// A segment is a part of a chain, whose length is a u32.
fn length(segment: &Segment) -> u32 {
    segment.iov_len as u32
}

fn count(segments: &[Segment]) -> u32 {
    segments.len().min(IOV_MAX) as u32
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// A ring with the requests that are in it, each in a place that does not move: the kernel reads their segments.
struct Ring {
    uring: IoUring,
    requests: Vec<Option<Request>>,
    free: Vec<u16>,
}

impl Ring {
    fn new(uring: IoUring, size: u16) -> Self {
        Self { uring, requests: (0..size).map(|_| None).collect(), free: (0..size).rev().collect() }
    }

    fn in_flight(&self) -> usize {
        self.requests.len() - self.free.len()
    }

    /// `begin` found room for it.
    fn push(&mut self, request: Request) {
        let place = self.free.pop().expect("a place");
        let request = self.requests[usize::from(place)].insert(request);
        let entry = request.entry().user_data(place.into());
        // SAFETY: the request stays where it is, and its chain keeps the memory mapped, until the kernel has answered;
        // `drop` waits for that.
        while unsafe { self.uring.submission().push(&entry) }.is_err() {
            self.submit(0);
        }
    }

    /// A request that the kernel has answered, and the answer.
    fn pop(&mut self) -> Option<(Request, io::Result<usize>)> {
        let entry = self.uring.completion().next()?;
        let place = entry.user_data() as u16;
        let request = self.requests[usize::from(place)].take().expect("an answer to a request");
        self.free.push(place);
        let answer = usize::try_from(entry.result()).map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some((request, answer))
    }

    /// Give the kernel what was pushed, and wait until it has answered `wanted` requests.
    fn submit(&mut self, wanted: usize) {
        // EINTR, EAGAIN and EBUSY go away; what was not taken stays in the queue for the next time.
        let _ = self.uring.submitter().submit_and_wait(wanted);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // The memory must not go before the kernel is done with it.
        while self.in_flight() > 0 {
            self.submit(1);
            while self.pop().is_some() {}
        }
    }
}
