//! Lists of buffers, of a guest or our own. The guest may change what is in its buffers at any time.

use vm_memory::VolatileSlice;

use crate::chain::Segment;

/// Our own bytes as a segment; they must outlive its use.
pub fn segment(bytes: &mut [u8]) -> Segment {
    Segment { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }
}

pub fn total(segments: &[Segment]) -> usize {
    segments.iter().map(|segment| segment.iov_len).sum()
}

/// Copy `data` to the front of the segments; return how much fitted.
pub fn copy_in(into: &[Segment], data: &[u8]) -> usize {
    let mut done = 0;
    for segment in into {
        let n = segment.iov_len.min(data.len() - done);
        // SAFETY: a segment of this module is mapped: whoever made the list holds its chain or its bytes.
        unsafe { VolatileSlice::new(segment.iov_base.cast(), n) }.copy_from(&data[done..done + n]);
        done += n;
    }
    done
}

/// Fill `out` from the front of the segments; return how many bytes there were.
pub fn copy_out(from: &[Segment], out: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in from {
        let n = segment.iov_len.min(out.len() - done);
        // SAFETY: as in `copy_in`.
        unsafe { VolatileSlice::new(segment.iov_base.cast(), n) }.copy_to(&mut out[done..done + n]);
        done += n;
    }
    done
}
