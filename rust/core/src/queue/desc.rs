//! What both rings make of descriptors: buffers, indirect tables and the areas they lie in (virtio 1.3, 2.7 and 2.8).

use crate::chain::Segments;
use crate::memory::GuestMemory;
use crate::GuestError;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;
pub const DESC_SIZE: u64 = 16;

/// One descriptor, as it was when it was read.
#[derive(Clone, Copy)]
pub struct Desc {
    pub address: u64,
    pub length: u32,
    pub flags: u16,
    /// The next descriptor of a chain in a split ring, the buffer id in a packed one.
    pub link: u16,
}

impl Desc {
    /// Of a split ring: address, length, flags, next.
    pub fn split(address: u64, rest: u64) -> Self {
        Self { address, length: rest as u32, flags: (rest >> 32) as u16, link: (rest >> 48) as u16 }
    }

    /// Of a packed ring: address, length, buffer id, flags.
    pub fn packed(address: u64, rest: u64) -> Self {
        Self { address, length: rest as u32, link: (rest >> 32) as u16, flags: (rest >> 48) as u16 }
    }

    /// The second half of a descriptor of a packed ring: length, buffer id, flags.
    pub fn packed_rest(&self) -> u64 {
        u64::from(self.length) | u64::from(self.link) << 32 | u64::from(self.flags) << 48
    }

    /// Add its buffer to a chain.
    pub fn push(&self, memory: &GuestMemory, segments: &mut Segments) -> Result<(), GuestError> {
        segments.push(memory, self.address, self.length, self.flags & WRITE != 0)
    }
}

/// An indirect table that lies in guest memory.
pub struct Table {
    address: u64,
    pub entries: u16,
}

impl Table {
    /// The table that a descriptor of a ring with `size` entries points to; `allowed` if INDIRECT_DESC was agreed.
    pub fn new(memory: &GuestMemory, desc: &Desc, size: u16, allowed: bool) -> Result<Self, GuestError> {
        let Desc { address, length, flags, .. } = *desc;
        if !allowed {
            return Err(GuestError("an indirect table without VIRTIO_F_INDIRECT_DESC".into()));
        }
        if flags & NEXT != 0 {
            return Err(GuestError("an indirect table with a next descriptor".into()));
        }
        if length == 0 || u64::from(length) % DESC_SIZE != 0 {
            return Err(GuestError(format!("an indirect table of {length} bytes (a multiple of 16)")));
        }
        let entries = u64::from(length) / DESC_SIZE;
        if entries > u64::from(size) {
            return Err(GuestError(format!("an indirect table of {entries} entries (at most {size})")));
        }
        memory.check(address, u64::from(length))?;
        Ok(Self { address, entries: entries as u16 })
    }

    /// Both halves of an entry below `entries`; a further table is none of them.
    pub fn desc(
        &self,
        memory: &GuestMemory,
        index: u16,
        parse: impl FnOnce(u64, u64) -> Desc,
    ) -> Result<Desc, GuestError> {
        let mut bytes = [0u8; DESC_SIZE as usize];
        memory.read(self.address + u64::from(index) * DESC_SIZE, &mut bytes)?;
        let both = u128::from_le_bytes(bytes);
        let desc = parse(both as u64, (both >> 64) as u64);
        if desc.flags & INDIRECT != 0 {
            return Err(GuestError(format!("indirect descriptor {index}: a table inside a table")));
        }
        Ok(desc)
    }
}

/// A part of a ring: its name, address, bytes and alignment.
pub type Area = (&'static str, u64, u64, u64);

/// Refuse areas that are unaligned or overlap, or pass the end of the address space.
pub fn check_areas(areas: [Area; 3]) -> Result<(), GuestError> {
    for (name, address, length, alignment) in areas {
        if address % alignment != 0 {
            return Err(GuestError(format!("the {name} at {address:#x} is not a multiple of {alignment}")));
        }
        if address.checked_add(length).is_none() {
            return Err(GuestError(format!("the {name} at {address:#x} passes the end of the address space")));
        }
    }
    for (one, two) in [(0, 1), (0, 2), (1, 2)] {
        let ((a, a0, alen, _), (b, b0, blen, _)) = (areas[one], areas[two]);
        if a0 < b0 + blen && b0 < a0 + alen {
            return Err(GuestError(format!("the {a} at {a0:#x} and the {b} at {b0:#x} overlap")));
        }
    }
    Ok(())
}
