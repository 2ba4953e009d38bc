//! Requests for neighbouring blocks are done together: one call, or one entry of io_uring, for all of them.

use std::sync::Arc;

use smallvec::SmallVec;

use super::blk::{BlkPlane, Buffers, Failure, Op, Stretch};
use super::pace::Pace;
use super::transfer::{transfer, Progress};
use crate::chain::{Chain, Segment};
use crate::queue::{Handler, VirtQueue};

/// Requests, and bytes, that are added to one at most: the first of them waits for the last.
const MAX_REQUESTS: usize = 16;
const MAX_BYTES: usize = 256 << 10;

/// A request of the driver, decoded.
type Decoded = (Chain, Result<Op, Failure>);

/// What there is to do next.
pub enum Work {
    Extent(Extent),
    /// Neither a read nor a write.
    Other(Chain, Result<Op, Failure>),
}

/// The requests that are available in a queue, neighbours put together.
pub struct Works<'a> {
    plane: &'a BlkPlane,
    vq: &'a Arc<VirtQueue>,
    /// It is not for what was put together before it.
    waiting: Option<Decoded>,
}

impl<'a> Works<'a> {
    pub fn new(plane: &'a BlkPlane, vq: &'a Arc<VirtQueue>) -> Self {
        Self { plane, vq, waiting: None }
    }

    fn pop(&self) -> Option<Decoded> {
        let mut chain = self.vq.pop()?;
        let op = self.plane.decode(&mut chain);
        Some((chain, op))
    }
}

impl Iterator for Works<'_> {
    type Item = Work;

    fn next(&mut self) -> Option<Work> {
        let (chain, op) = self.waiting.take().or_else(|| self.pop())?;
        let Ok(Op::Transfer(stretch)) = op else {
            return Some(Work::Other(chain, op));
        };
        let mut extent = Extent::new(chain, stretch);
        // Written through, what came before a failure would have to be flushed first.
        let merges = !stretch.write || !self.plane.is_writethrough();
        while merges && extent.has_room() && self.waiting.is_none() {
            match self.pop() {
                None => break,
                Some((chain, Ok(Op::Transfer(next)))) if extent.is_followed_by(next) => {
                    self.plane.counters.merged.add(1);
                    extent.add(chain, next.length);
                }
                other => self.waiting = other,
            }
        }
        Some(Work::Extent(extent))
    }
}

/// One of the requests, and how many of the bytes and of the pieces are its.
struct Part {
    chain: Chain,
    length: usize,
    pieces: usize,
}

/// A stretch of the disk that is read or written at once, for one request or for several.
pub struct Extent {
    pub stretch: Stretch,
    /// Where the data goes or comes from, in this process. The parts keep it mapped.
    pub pieces: SmallVec<[Segment; 4]>,
    parts: SmallVec<[Part; 1]>,
}

// SAFETY: the pieces lead to shared guest memory, which any thread may access.
unsafe impl Send for Extent {}

impl Extent {
    fn new(chain: Chain, stretch: Stretch) -> Self {
        let nothing = Stretch { length: 0, ..stretch };
        let mut extent = Self { stretch: nothing, pieces: SmallVec::new(), parts: SmallVec::new() };
        extent.add(chain, stretch.length);
        extent
    }

    /// For a request without data.
    pub fn empty(chain: Chain) -> Self {
        Self::new(chain, Stretch { write: true, offset: 0, length: 0 })
    }

    fn add(&mut self, mut chain: Chain, length: usize) {
        let pieces = if self.stretch.write { chain.take_readable(length) } else { chain.take_writable(length) };
        self.pieces.extend_from_slice(&pieces);
        self.parts.push(Part { chain, length, pieces: pieces.len() });
        self.stretch.length += length;
    }

    fn has_room(&self) -> bool {
        self.parts.len() < MAX_REQUESTS && self.stretch.length < MAX_BYTES
    }

    fn is_followed_by(&self, next: Stretch) -> bool {
        let Stretch { write, offset, length } = self.stretch;
        write == next.write && offset + length as u64 == next.offset && length + next.length <= MAX_BYTES
    }

    pub fn requests(&self) -> u32 {
        self.parts.len() as u32
    }

    /// Do it on this thread, and answer.
    pub fn execute(mut self, plane: &BlkPlane) {
        loop {
            let (done, result) = self.transfer(plane);
            let result = result.and_then(|()| plane.flush_after(self.stretch.write));
            match self.answer(plane, done, result) {
                Some(rest) => self = rest,
                None => return,
            }
        }
    }

    fn transfer(&mut self, plane: &BlkPlane) -> Progress {
        let Stretch { write, offset, .. } = self.stretch;
        let memory = self.parts[0].chain.memory();
        transfer(&mut self.pieces, offset, |segments, at| plane.step(write, &Buffers { memory, segments }, at))
    }

    /// Answer the requests, of whose bytes `done` were transferred. A failure before the end is that of the request
    /// it came in; what comes after that one is left to do.
    pub fn answer(mut self, plane: &BlkPlane, done: usize, result: Result<(), Failure>) -> Option<Self> {
        let mut parts = std::mem::take(&mut self.parts).into_iter();
        let (all, mut left, mut over, mut pieces) = (done == self.stretch.length, done, 0, 0);
        for mut part in parts.by_ref() {
            let n = left.min(part.length);
            (left, over, pieces) = (left - n, over + part.length, pieces + part.pieces);
            plane.transferred(&mut part.chain, self.stretch.write, n);
            let ended = n == part.length;
            // A file refuses what it cannot do, and breaks no device.
            let _ = plane.answer(&mut part.chain, if ended && !all { Ok(()) } else { result.clone() });
            if !ended {
                break;
            }
        }
        self.parts = parts.collect();
        // Whole ones: those of the request that failed may have been shortened.
        self.pieces.drain(..pieces);
        let Stretch { write, offset, length } = self.stretch;
        self.stretch = Stretch { write, offset: offset + over as u64, length: length - over };
        (!self.parts.is_empty()).then_some(self)
    }
}

/// Serves the queues of a disk that may do several requests at once.
pub struct Merging(pub Arc<BlkPlane>);

impl Handler for Merging {
    fn handle(&self, vq: &Arc<VirtQueue>) {
        let (plane, mut pace) = (&*self.0, Pace::new());
        for work in Works::new(plane, vq) {
            let mut requests = 1;
            match work {
                Work::Extent(extent) => {
                    requests = extent.requests();
                    extent.execute(plane);
                }
                Work::Other(mut chain, op) => {
                    if plane.serve(&mut chain, op).is_err() {
                        return;
                    }
                }
            }
            if pace.answered(requests) {
                vq.publish();
            }
        }
    }
}
