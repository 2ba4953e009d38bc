//! Frames that can be told from any others, and say when something happened to them on their way.
//!
//! Behind the Ethernet header, whose addresses a back-end may swap, stand little-endian: the stream (2 bytes), the
//! sequence number (8) and the checksum (4) of these two and of all that follows: Adler-32, as RFC 1950 has it.

use super::pattern::fill;

const ADDRESSES: [u8; 12] = [0x52, 0x54, 0, 0, 0, 2, 0x52, 0x54, 0, 0, 0, 1];
/// Local experimental (IEEE 802).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
const STREAM: usize = 14;
const SEQUENCE: usize = 16;
const CHECKSUM: usize = 24;
const PAYLOAD: usize = 28;
/// The least that a frame has: what Ethernet asks for, without the checksum that cards add.
pub const LEAST: usize = 60;

/// What a frame turned out to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Content {
    /// It is none of ours.
    Foreign,
    Damaged,
    Intact {
        stream: u16,
        sequence: u64,
    },
}

/// Fill `out`, of at least `LEAST` bytes: no two frames are alike.
pub fn write(out: &mut [u8], stream: u16, sequence: u64) {
    out[..ADDRESSES.len()].copy_from_slice(&ADDRESSES);
    out[ADDRESSES.len()..STREAM].copy_from_slice(&ETHERTYPE);
    out[STREAM..SEQUENCE].copy_from_slice(&stream.to_le_bytes());
    out[SEQUENCE..CHECKSUM].copy_from_slice(&sequence.to_le_bytes());
    fill(&mut out[PAYLOAD..], sequence, stream.into());
    let sum = checksum(out);
    out[CHECKSUM..PAYLOAD].copy_from_slice(&sum.to_le_bytes());
}

pub fn read(frame: &[u8]) -> Content {
    if frame.len() < PAYLOAD || frame[ADDRESSES.len()..STREAM] != ETHERTYPE {
        return Content::Foreign;
    }
    let number = |from: usize, to: usize| frame[from..to].iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte));
    if number(CHECKSUM, PAYLOAD) != u64::from(checksum(frame)) {
        return Content::Damaged;
    }
    Content::Intact { stream: number(STREAM, SEQUENCE) as u16, sequence: number(SEQUENCE, CHECKSUM) }
}

fn checksum(frame: &[u8]) -> u32 {
    const MODULUS: u64 = 65521;
    let covered = frame[STREAM..CHECKSUM].iter().chain(&frame[PAYLOAD..]);
    // No frame is long enough for an overflow.
    let (a, b) = covered.fold((1, 0), |(a, b), byte| (a + u64::from(*byte), b + a + u64::from(*byte)));
    (b % MODULUS) as u32 * 65536 + (a % MODULUS) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        let mut frame = vec![0; length];
        write(&mut frame, 3, 0x0102_0304_0506_0708);
        frame
    }

    #[test]
    fn what_was_written_is_read_back() {
        for length in [LEAST, 1500, 65535] {
            let intact = Content::Intact { stream: 3, sequence: 0x0102_0304_0506_0708 };
            assert_eq!(read(&frame(length)), intact, "{length}");
        }
    }

    #[test]
    fn addresses_may_change_and_nothing_else() {
        let whole = frame(LEAST);
        for at in 0..LEAST {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            let expected = match at {
                0..12 => read(&whole),
                12..14 => Content::Foreign,
                _ => Content::Damaged,
            };
            assert_eq!(read(&changed), expected, "byte {at}");
        }
    }

    #[test]
    fn a_frame_that_was_cut_is_damaged_or_none_of_ours() {
        let whole = frame(100);
        for length in 0..100 {
            let expected = if length < PAYLOAD { Content::Foreign } else { Content::Damaged };
            assert_eq!(read(&whole[..length]), expected, "{length}");
        }
    }

    #[test]
    fn the_checksum_is_that_of_rfc_1950() {
        let mut frame = [0; PAYLOAD + 9];
        frame[PAYLOAD..].copy_from_slice(b"Wikipedia");
        // As `zlib.adler32(bytes(10) + b"Wikipedia")` says in Python.
        assert_eq!(checksum(&frame), 0x11f0_0398);
    }
}
