//! `struct virtio_net_hdr` (virtio 1.3, 5.1.6), which stands before each frame: what was agreed, checked.

use super::counters::Reason;

/// Bytes of the header on a back-end's file descriptor, and of a driver's unless it is an old one.
pub const HEADER: usize = 12;
/// Bytes without `num_buffers`: a legacy driver that did not accept VIRTIO_NET_F_MRG_RXBUF.
pub const LEGACY_HEADER: usize = 10;

const F_NEEDS_CSUM: u8 = 1;
const F_DATA_VALID: u8 = 2;

const GSO_NONE: u8 = 0;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

const CHECKSUM: usize = 2;

/// What one side leaves to the other: the HOST_ features for frames of the driver, the GUEST_ ones for frames to it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offloads {
    pub csum: bool,
    pub tso4: bool,
    pub tso6: bool,
    pub ecn: bool,
    pub uso: bool,
}

/// A header; both parties to the memory or the socket it comes from are strangers, so that it is read once.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Header {
    flags: u8,
    gso_type: u8,
    hdr_len: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    pub fn parse(bytes: &[u8; HEADER]) -> Self {
        let word = |at| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        Self {
            flags: bytes[0],
            gso_type: bytes[1],
            hdr_len: word(2),
            gso_size: word(4),
            csum_start: word(6),
            csum_offset: word(8),
        }
    }

    pub fn bytes(&self, num_buffers: u16) -> [u8; HEADER] {
        let mut bytes = [self.flags, self.gso_type, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let words = [self.hdr_len, self.gso_size, self.csum_start, self.csum_offset, num_buffers];
        for (word, place) in words.iter().zip(bytes[2..].chunks_exact_mut(2)) {
            place.copy_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// The header as it may be passed on, before a frame of `length` bytes; or why the frame may not.
    pub fn check(&self, length: usize, agreed: Offloads) -> Result<Self, Reason> {
        let mut checked = Self::default();
        if self.flags & F_NEEDS_CSUM != 0 {
            self.check_csum(length, agreed)?;
            checked = Self { csum_start: self.csum_start, csum_offset: self.csum_offset, ..checked };
        }
        if self.gso_type != GSO_NONE {
            self.check_gso(length, agreed)?;
            checked = Self { gso_type: self.gso_type, gso_size: self.gso_size, hdr_len: self.hdr_len, ..checked };
        }
        let known = if agreed.csum { F_NEEDS_CSUM | F_DATA_VALID } else { 0 };
        Ok(Self { flags: self.flags & known, ..checked })
    }

    fn check_csum(&self, length: usize, agreed: Offloads) -> Result<(), Reason> {
        if !agreed.csum {
            return Err(Reason::Offload);
        }
        let end = usize::from(self.csum_start) + usize::from(self.csum_offset) + CHECKSUM;
        if end > length {
            return Err(Reason::Header);
        }
        Ok(())
    }

    fn check_gso(&self, length: usize, agreed: Offloads) -> Result<(), Reason> {
        let ecn = self.gso_type & GSO_ECN != 0;
        let allowed = match self.gso_type & !GSO_ECN {
            GSO_TCPV4 => agreed.tso4 && (agreed.ecn || !ecn),
            GSO_TCPV6 => agreed.tso6 && (agreed.ecn || !ecn),
            GSO_UDP_L4 => agreed.uso && !ecn,
            _ => false,
        };
        if !allowed {
            return Err(Reason::Offload);
        }
        if self.gso_size == 0 || usize::from(self.hdr_len) > length {
            return Err(Reason::Header);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Offloads = Offloads { csum: true, tso4: true, tso6: true, ecn: true, uso: true };

    fn gso(gso_type: u8) -> Header {
        Header { flags: F_NEEDS_CSUM, gso_type, hdr_len: 54, gso_size: 1448, csum_start: 34, csum_offset: 16 }
    }

    #[test]
    fn a_header_survives_its_bytes() {
        let header = gso(GSO_TCPV4);
        assert_eq!(header.bytes(7), [1, 1, 54, 0, 0xA8, 5, 34, 0, 16, 0, 7, 0]);
        assert_eq!(Header::parse(&header.bytes(7)), header);
    }

    #[test]
    fn the_checksum_field_lies_within_the_frame() {
        let header = Header { flags: F_NEEDS_CSUM, csum_start: 34, csum_offset: 16, ..Header::default() };
        assert_eq!(header.check(52, ALL), Ok(header));
        assert_eq!(header.check(51, ALL), Err(Reason::Header));
        let far = Header { csum_start: u16::MAX, csum_offset: u16::MAX, ..header };
        assert_eq!(far.check(65_000, ALL), Err(Reason::Header));
        assert_eq!(header.check(60, Offloads { csum: false, ..ALL }), Err(Reason::Offload));
    }

    #[test]
    fn segments_need_the_feature_of_their_kind() {
        type Kind = (u8, fn(&mut Offloads));
        let kinds: [Kind; 5] = [
            (GSO_TCPV4, |agreed| agreed.tso4 = false),
            (GSO_TCPV6, |agreed| agreed.tso6 = false),
            (GSO_TCPV4 | GSO_ECN, |agreed| agreed.ecn = false),
            (GSO_TCPV6 | GSO_ECN, |agreed| agreed.ecn = false),
            (GSO_UDP_L4, |agreed| agreed.uso = false),
        ];
        for (kind, remove) in kinds {
            let mut less = ALL;
            remove(&mut less);
            assert_eq!(gso(kind).check(3000, ALL), Ok(gso(kind)));
            assert_eq!(gso(kind).check(3000, less), Err(Reason::Offload), "{kind:#x}");
        }
        for unknown in [2, 3, 6, GSO_ECN, GSO_UDP_L4 | GSO_ECN, 0x7F] {
            assert_eq!(gso(unknown).check(3000, ALL), Err(Reason::Offload), "{unknown:#x}");
        }
    }

    #[test]
    fn a_segment_has_a_size_and_headers_within_the_frame() {
        assert_eq!(Header { gso_size: 0, ..gso(GSO_TCPV4) }.check(3000, ALL), Err(Reason::Header));
        assert_eq!(Header { hdr_len: 3001, ..gso(GSO_TCPV4) }.check(3000, ALL), Err(Reason::Header));
    }

    #[test]
    fn what_says_nothing_is_passed_on_as_zeroes() {
        let noise = Header { flags: 0xFC, gso_type: GSO_NONE, hdr_len: 9, gso_size: 9, csum_start: 9, csum_offset: 9 };
        assert_eq!(noise.check(60, ALL), Ok(Header::default()));
        let valid = Header { flags: F_DATA_VALID, ..Header::default() };
        assert_eq!(valid.check(60, ALL), Ok(valid));
        assert_eq!(valid.check(60, Offloads::default()), Ok(Header::default()), "it was not agreed");
    }
}
