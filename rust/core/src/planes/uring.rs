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

use super::blk::{BlkPlane, Broken, Failure, Op, Stretch};
use super::file::{FileBackend, IOV_MAX};
use super::merge::{Extent, Work, Works};
use super::transfer::skip;
use crate::chain::Segment;
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

    /// Begin what is for the ring, and do the rest at once.
    fn begin(&self, ring: &mut Ring, work: Work) -> Result<(), Broken> {
        let plane = &*self.plane;
        let mut request = match work {
            Work::Extent(extent) if self.file.takes(&extent.pieces) => Request::new(extent, false),
            Work::Extent(extent) => {
                extent.execute(plane);
                return Ok(());
            }
            Work::Other(chain, Ok(Op::Flush)) => {
                plane.counters.flushes.add(1);
                Request::new(Extent::empty(chain), true)
            }
            Work::Other(mut chain, op) => return plane.serve(&mut chain, op),
        };
        if ring.free.is_empty() {
            // The queue counts a chain twice that is given back twice, on purpose.
            let size = ring.requests.len();
            let reason = format!("more requests under way than the queue has entries ({size})");
            drop(request.extent.answer(plane, 0, Err(Failure::Broken(reason))));
            return Err(Broken);
        }
        let step = if request.flush { Step::Again } else { request.advance(plane, 0) };
        self.go_on(ring, request, step);
        Ok(())
    }

    fn go_on(&self, ring: &mut Ring, request: Request, step: Step) {
        match step {
            Step::Again => ring.push(request),
            Step::Done(result) => {
                if let Some(rest) = request.extent.answer(&self.plane, request.done, result) {
                    ring.push(Request::new(rest, false));
                }
            }
        }
    }

    /// Go on with the requests that the kernel has answered.
    fn reap(&self, ring: &mut Ring) {
        while let Some((mut request, answer)) = ring.pop() {
            let step = match answer {
                Ok(0) if !request.flush => Step::Done(Err(Failure::Refused)), // the file ends here
                Ok(done) => request.advance(&self.plane, done),
                Err(error) if is_transient(&error) => Step::Again,
                Err(error) => Step::Done(Err(error.into())),
            };
            self.go_on(ring, request, step);
        }
    }

    /// Wait for all that was begun.
    fn drain(&self, ring: &mut Ring) {
        while ring.in_flight() > 0 {
            ring.submit(1);
            self.reap(ring);
        }
    }

    fn serve(&self, vq: &Arc<VirtQueue>) -> Result<(), Broken> {
        let mut ring = self.ring();
        self.reap(&mut ring);
        for work in Works::new(&self.plane, vq) {
            self.begin(&mut ring, work)?;
        }
        ring.submit(0);
        if !ring.uring.submission().is_empty() {
            vq.signal(); // the kernel was short of something: again soon
        }
        if !vq.attached() {
            // Nobody polls the eventfd: who notified waits for the answer.
            self.drain(&mut ring);
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
        self.drain(&mut self.ring());
    }
}

/// A request under way.
struct Request {
    extent: Extent,
    /// All is written, if there was anything, and has to be made durable.
    flush: bool,
    /// Bytes read or written so far; the pieces before `next` are done.
    done: usize,
    next: usize,
}

enum Step {
    Again,
    Done(Result<(), Failure>),
}

impl Request {
    fn new(extent: Extent, flush: bool) -> Self {
        Self { extent, flush, done: 0, next: 0 }
    }

    /// The kernel did `n` bytes more, or was not asked before; what is to be done next.
    fn advance(&mut self, plane: &BlkPlane, n: usize) -> Step {
        if self.flush {
            return Step::Done(Ok(()));
        }
        let all = self.extent.pieces.len();
        self.done += n;
        self.next = all - skip(&mut self.extent.pieces[self.next..], n).len();
        if self.next < all {
            return Step::Again;
        }
        self.flush = self.extent.stretch.write && plane.is_writethrough();
        if !self.flush {
            return Step::Done(Ok(()));
        }
        plane.counters.flushes.add(1);
        Step::Again
    }

    fn entry(&self) -> squeue::Entry {
        let Stretch { write, offset, .. } = self.extent.stretch;
        let (rest, at) = (&self.extent.pieces[self.next..], offset + self.done as u64);
        match (write, rest) {
            _ if self.flush => opcode::Fsync::new(FILE).flags(types::FsyncFlags::DATASYNC).build(),
            (false, [one]) => opcode::Read::new(FILE, one.iov_base.cast(), length(one)).offset(at).build(),
            (true, [one]) => opcode::Write::new(FILE, one.iov_base.cast(), length(one)).offset(at).build(),
            (false, _) => opcode::Readv::new(FILE, rest.as_ptr(), count(rest)).offset(at).build(),
            (true, _) => opcode::Writev::new(FILE, rest.as_ptr(), count(rest)).offset(at).build(),
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
