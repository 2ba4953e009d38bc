//! The receive queue: a frame is read into the driver's buffers, and what does not fit the first goes to the next.

use std::ops::Range;
use std::sync::{Arc, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::counters::Reason;
use super::filter::{Filter, DECIDING};
use super::header::Header;
use super::port::Refused;
use super::segments::{copy_in, copy_out, segment, total};
use super::{Config, Pair, Shared, ETHERNET, MAX_FRAME, MAX_SEGMENTS};
use crate::chain::{Chain, Segment};
use crate::queue::VirtQueue;

/// Buffers that one frame may take; a service hands out as many and one more.
const MAX_BUFFERS: usize = 255;

/// Bytes of a frame that did not fit into the driver's first buffer, or a frame that waits for more buffers.
pub(super) struct Landing {
    bytes: Box<[u8]>,
    waiting: Option<Frame>,
}

/// A frame that passed all checks.
#[derive(Clone, Copy)]
struct Frame {
    header: Header,
    length: usize,
}

/// A buffer of the driver: room for the header, and room for the frame.
struct Room {
    chain: Chain,
    header: SmallVec<[Segment; 4]>,
    frame: SmallVec<[Segment; 4]>,
}

/// What became of a buffer.
enum Step {
    /// It holds a frame of this length, maybe with others.
    Filled(u64),
    /// It was not used, and is the driver's again; go on with the next frame.
    Dropped,
    /// Wait for frames.
    NoFrame,
    /// Wait for buffers.
    NoBuffers,
}

impl Landing {
    pub fn new() -> Self {
        // One more than a frame may have, so that one which is too long shows.
        Self { bytes: vec![0; MAX_FRAME + 1].into(), waiting: None }
    }

    /// Forget the frame that waits; whether there was one.
    pub fn clear(&mut self) -> bool {
        self.waiting.take().is_some()
    }
}

impl Pair {
    /// Give frames to the driver until there are no more, or no buffers; an error is why the device breaks.
    pub(super) fn receive(&self, shared: &Shared, vq: &Arc<VirtQueue>, active: bool) -> Result<(), String> {
        let mut receiver = Receiver {
            pair: self,
            shared,
            vq,
            config: shared.config(),
            filter: shared.filter(),
            landing: self.landing.lock().unwrap_or_else(PoisonError::into_inner),
        };
        let (mut frames, mut bytes) = (0, 0);
        let waits = loop {
            if !active {
                break false;
            }
            let Some(chain) = vq.pop() else {
                break false;
            };
            match receiver.fill(chain)? {
                Step::Filled(length) => (frames, bytes) = (frames + 1, bytes + length),
                Step::Dropped => (),
                Step::NoFrame => break true,
                Step::NoBuffers => break false,
            }
        };
        self.received.passed(frames, bytes);
        self.receiving.settle(vq, waits).map_err(|error| format!("cannot wait for the network: {error}"))
    }
}

/// A pass over the receive queue.
struct Receiver<'a> {
    pair: &'a Pair,
    shared: &'a Shared,
    vq: &'a Arc<VirtQueue>,
    config: Config,
    filter: Arc<Filter>,
    landing: MutexGuard<'a, Landing>,
}

impl Receiver<'_> {
    /// Put the next frame into this buffer.
    fn fill(&mut self, chain: Chain) -> Result<Step, String> {
        let room = self.room(chain)?;
        match self.landing.waiting.take() {
            Some(frame) => {
                let here = copy_in(&room.frame, &self.landing.bytes[..frame.length]);
                self.deliver(room, frame, here..frame.length)
            }
            None => self.fill_from_port(room),
        }
    }

    fn room(&self, mut chain: Chain) -> Result<Room, String> {
        let needed = self.config.header;
        let header = chain.take_writable(needed);
        let bytes = total(&header);
        if bytes < needed {
            self.vq.unpop(chain);
            return Err(format!("a receive buffer of {bytes} bytes has no room for the header of {needed}"));
        }
        let mut frame = chain.take_writable(chain.writable_left());
        frame.truncate(MAX_SEGMENTS);
        Ok(Room { chain, header, frame })
    }

    fn fill_from_port(&mut self, room: Room) -> Result<Step, String> {
        let mut into: SmallVec<[Segment; 8]> = SmallVec::from_slice(&room.frame);
        into.push(segment(&mut self.landing.bytes));
        let (header, length) = match self.pair.port.receive(&into) {
            Ok(received) => received,
            Err(refused) => return self.refused(room, refused),
        };
        match self.check(&room, header, length) {
            Ok(header) => {
                let rest = length.saturating_sub(total(&room.frame));
                self.deliver(room, Frame { header, length }, 0..rest)
            }
            Err(reason) => Ok(self.drop_frame(room, reason)),
        }
    }

    fn refused(&self, room: Room, refused: Refused) -> Result<Step, String> {
        if let Refused::Dropped(reason) = refused {
            return Ok(self.drop_frame(room, reason));
        }
        self.vq.unpop(room.chain);
        match refused {
            Refused::Broken(reason) => Err(reason),
            Refused::Busy => Ok(Step::NoFrame),
            _ => Ok(Step::NoBuffers),
        }
    }

    fn drop_frame(&self, room: Room, reason: Reason) -> Step {
        self.pair.received.dropped(reason, 1);
        self.vq.unpop(room.chain);
        Step::Dropped
    }

    /// The header as the driver may have it; or why it may not have the frame.
    fn check(&self, room: &Room, header: Header, length: usize) -> Result<Header, Reason> {
        if !(ETHERNET..=MAX_FRAME).contains(&length) {
            return Err(Reason::Length);
        }
        let header = header.check(length, self.config.to_driver)?;
        if !self.shared.link_up() {
            return Err(Reason::Link);
        }
        let mut start = [0; DECIDING];
        let here = copy_out(&room.frame, &mut start);
        start[here..].copy_from_slice(&self.landing.bytes[..DECIDING - here]);
        start[length.min(DECIDING)..].fill(0);
        if self.filter.passes(&start) {
            Ok(header)
        } else {
            Err(Reason::Filter)
        }
    }

    /// Give the driver a frame whose beginning is in its first buffer, and the rest at `rest` of the landing.
    fn deliver(&mut self, mut room: Room, frame: Frame, rest: Range<usize>) -> Result<Step, String> {
        let mut more = SmallVec::<[Chain; 4]>::new();
        let mut at = rest.start;
        while at < rest.end {
            if more.len() + 1 >= self.most_buffers() {
                self.give_back(more);
                return Ok(self.drop_frame(room, Reason::Buffer));
            }
            let Some(mut chain) = self.vq.pop() else {
                self.give_back(more);
                return Ok(self.hold(room, frame, rest));
            };
            let n = chain.write(&self.landing.bytes[at..rest.end]).unwrap_or(0);
            more.push(chain);
            if n == 0 {
                self.give_back(more);
                self.vq.unpop(room.chain);
                return Err("a receive buffer of 0 bytes".into());
            }
            at += n;
        }
        let here = frame.length - rest.len();
        if let Some(capture) = &self.shared.capture {
            capture.record(&first(&room.frame, here), &self.landing.bytes[rest]);
        }
        copy_in(&room.header, &frame.header.bytes(1 + more.len() as u16)[..self.config.header]);
        room.chain.wrote((self.config.header + here) as u32);
        more.insert(0, room.chain);
        for chain in &mut more {
            // It fails for a stale chain only, and then nobody waits for it.
            let _ = chain.complete();
        }
        Ok(Step::Filled(frame.length as u64))
    }

    /// How many buffers a frame may take; a driver cannot add one more than the ring has entries.
    fn most_buffers(&self) -> usize {
        if self.config.merge {
            MAX_BUFFERS.min(self.vq.size().into())
        } else {
            1
        }
    }

    /// Keep the frame until the driver has added buffers.
    fn hold(&mut self, room: Room, frame: Frame, rest: Range<usize>) -> Step {
        let here = frame.length - rest.len();
        self.landing.bytes.copy_within(rest, here);
        copy_out(&room.frame, &mut self.landing.bytes[..here]);
        self.landing.waiting = Some(frame);
        self.vq.unpop(room.chain);
        Step::NoBuffers
    }

    /// In the reverse order in which they were taken.
    fn give_back(&self, chains: SmallVec<[Chain; 4]>) {
        chains.into_iter().rev().for_each(|chain| self.vq.unpop(chain));
    }
}

/// The first `length` bytes of the segments.
fn first(segments: &[Segment], mut length: usize) -> SmallVec<[Segment; 4]> {
    let cut = |segment: &Segment| {
        let iov_len = segment.iov_len.min(length);
        length -= iov_len;
        Segment { iov_len, ..*segment }
    };
    segments.iter().map(cut).collect()
}
