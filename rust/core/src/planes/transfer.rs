//! Going through the buffers of a request in pieces and steps, whoever does the I/O.

use smallvec::SmallVec;
use vm_memory::VolatileSlice;

use super::blk::Failure;
use crate::chain::{Chain, Segment};
use crate::memory::GuestMemory;

/// Bytes a backend is given at a time: a guest may ask for 4 GiB in one request.
pub const PIECE: usize = 1 << 20;

/// Some of the buffers of a request, in this process. The guest may change what is in them at any time.
pub struct Buffers<'a> {
    /// What keeps them mapped.
    pub memory: &'a GuestMemory,
    pub segments: &'a [Segment],
}

impl Buffers<'_> {
    /// How many bytes they hold together.
    pub fn total(&self) -> usize {
        self.segments.iter().map(|segment| segment.iov_len).sum()
    }

    /// Copy `data` to the front of the buffers; return how much fitted.
    pub fn fill(&self, data: &[u8]) -> usize {
        let mut done = 0;
        for segment in self.segments {
            let n = segment.iov_len.min(data.len() - done);
            // SAFETY: `memory` keeps the segment mapped.
            unsafe { VolatileSlice::new(segment.iov_base.cast(), n) }.copy_from(&data[done..done + n]);
            done += n;
        }
        done
    }

    /// Copy the front of the buffers to `out`, which is no longer than all of them.
    pub fn gather(&self, out: &mut [u8]) {
        let mut done = 0;
        for segment in self.segments {
            let n = segment.iov_len.min(out.len() - done);
            // SAFETY: `memory` keeps the segment mapped.
            unsafe { VolatileSlice::new(segment.iov_base.cast(), n) }.copy_to(&mut out[done..done + n]);
            done += n;
        }
    }
}

/// How many bytes were done, also if not all were.
pub type Progress = (usize, Result<(), Failure>);

/// Let `step` go through the next `length` bytes of the chain, which `take` finds, in pieces of bounded size.
pub fn in_pieces(
    chain: &mut Chain,
    length: usize,
    offset: u64,
    take: fn(&mut Chain, usize) -> SmallVec<[Segment; 4]>,
    mut step: impl FnMut(&Buffers<'_>, u64) -> Result<usize, Failure>,
) -> Progress {
    let mut done = 0;
    while done < length {
        let mut segments = take(chain, PIECE.min(length - done));
        let memory = chain.memory();
        let (more, result) = transfer(&mut segments, offset + done as u64, |segments, offset| {
            step(&Buffers { memory, segments }, offset)
        });
        done += more;
        if result.is_err() {
            return (done, result);
        }
    }
    (done, Ok(()))
}

/// Let `step` go through all segments, in as many steps as it needs.
pub fn transfer(
    segments: &mut [Segment],
    offset: u64,
    mut step: impl FnMut(&[Segment], u64) -> Result<usize, Failure>,
) -> Progress {
    let (mut rest, mut done) = (skip(segments, 0), 0);
    while !rest.is_empty() {
        match step(rest, offset + done as u64) {
            Ok(0) => return (done, Err(Failure::Refused)),
            Ok(n) => {
                done += n;
                rest = skip(rest, n);
            }
            Err(failure) => return (done, Err(failure)),
        }
    }
    (done, Ok(()))
}

/// What is left of the segments after `n` bytes; empty ones in front are dropped.
pub fn skip(segments: &mut [Segment], mut n: usize) -> &mut [Segment] {
    let mut whole = 0;
    while whole < segments.len() && segments[whole].iov_len <= n {
        n -= segments[whole].iov_len;
        whole += 1;
    }
    let rest = &mut segments[whole..];
    if let Some(first) = rest.first_mut() {
        // SAFETY: `n` is within the segment.
        first.iov_base = unsafe { first.iov_base.cast::<u8>().add(n) }.cast();
        first.iov_len -= n;
    }
    rest
}
