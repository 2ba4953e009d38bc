//! The transmit queue: a frame of the driver is checked and written from where it lies.

use std::sync::Arc;

use smallvec::SmallVec;

use super::counters::Reason;
use super::header::{Header, HEADER};
use super::port::Refused;
use super::segments::{copy_out, segment};
use super::{Config, Pair, Shared, ETHERNET, MAX_FRAME, MAX_SEGMENTS};
use crate::chain::{Chain, Segment};
use crate::queue::VirtQueue;

impl Pair {
    /// Send what the driver has made available; an error is why the device breaks.
    pub(super) fn transmit(&self, shared: &Shared, vq: &Arc<VirtQueue>) -> Result<(), String> {
        let config = shared.config();
        let (mut frames, mut bytes) = (0, 0);
        let mut busy = false;
        while let Some(mut chain) = vq.pop() {
            match self.send(shared, config, &mut chain) {
                Ok(length) => (frames, bytes) = (frames + 1, bytes + length as u64),
                Err(Refused::Busy) => {
                    // The driver is slowed down, and loses nothing: what QEMU and vhost do as well.
                    vq.unpop(chain);
                    busy = true;
                    break;
                }
                Err(Refused::Dropped(reason)) => self.sent.dropped(reason, 1),
                Err(Refused::Closed) => self.sent.dropped(Reason::Error, 1),
                Err(Refused::Broken(reason)) => {
                    vq.unpop(chain);
                    return Err(reason);
                }
            }
            // It fails for a stale chain only, and then nobody waits for it.
            let _ = chain.complete();
        }
        self.sent.passed(frames, bytes);
        let waits = busy || self.port.flush() == Err(Refused::Busy);
        self.sending.settle(vq, waits).map_err(|error| format!("cannot wait for the network: {error}"))
    }

    /// Send one frame; return its length.
    fn send(&self, shared: &Shared, config: Config, chain: &mut Chain) -> Result<usize, Refused> {
        let header = read_header(chain, config).ok_or(Refused::Dropped(Reason::Header))?;
        let length = chain.readable_left();
        if !(ETHERNET..=MAX_FRAME).contains(&length) {
            return Err(Refused::Dropped(Reason::Length));
        }
        let header = header.check(length, config.from_driver).map_err(Refused::Dropped)?;
        if !shared.link_up() {
            return Err(Refused::Dropped(Reason::Link));
        }
        let mut copy = Vec::new();
        let mut frame = gather(chain, length, &mut copy);
        self.port.send(&header, &mut frame)?;
        if let Some(capture) = &shared.capture {
            capture.record(&frame[1..], &[]);
        }
        Ok(length)
    }
}

fn read_header(chain: &mut Chain, config: Config) -> Option<Header> {
    let mut raw = [0; HEADER];
    let read = chain.read(&mut raw[..config.header]).ok()?;
    (read == config.header).then(|| Header::parse(&raw))
}

/// The segments of the frame behind one for the port; one that is cut up too small goes through `copy`.
fn gather(chain: &mut Chain, length: usize, copy: &mut Vec<u8>) -> SmallVec<[Segment; 8]> {
    let pieces = chain.take_readable(length);
    let mut frame = SmallVec::new();
    frame.push(segment(&mut []));
    if pieces.len() <= MAX_SEGMENTS {
        frame.extend_from_slice(&pieces);
    } else {
        copy.resize(length, 0);
        copy_out(&pieces, copy);
        frame.push(segment(copy));
    }
    frame
}
