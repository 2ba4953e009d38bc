//! Guest RAM: files mapped shared, and accesses that are checked against them.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64};
use std::sync::Arc;

use vm_memory::{Address, FileOffset, GuestAddress, GuestMemoryRegion, GuestRegionMmap, MmapRegion, VolatileSlice};

use crate::sigbus::Watch;
use crate::sync::duplicate;
use crate::GuestError;

const PAGE: u128 = 4096;

/// One region as its owner described it, and where this process mapped it.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    pub address: u64,
    pub size: u64,
    pub fd: RawFd,
    pub offset: u64,
    pub host: *mut u8,
}

/// Regions of guest RAM. Immutable; a clone is another reference, and the mapping lives as long as one.
#[derive(Clone, Default)]
pub struct GuestMemory(Arc<Vec<Arc<Mapped>>>);

/// A region where it is mapped. Watched for as long, because a file may be truncated by whoever shares it.
struct Mapped {
    _watch: Watch,
    region: GuestRegionMmap,
}

impl Deref for Mapped {
    type Target = GuestRegionMmap;

    fn deref(&self) -> &GuestRegionMmap {
        &self.region
    }
}

impl GuestMemory {
    /// Map `(guest address, size, fd, file offset)`; the fds are duplicated.
    pub fn new(regions: &[(u64, u64, RawFd, u64)]) -> io::Result<Self> {
        Self::default().remap(regions)
    }

    /// Other regions in the place of these. One that stays as it is, on the fd that `regions` tells, is shared: whoever
    /// keeps the old memory keeps no second mapping.
    pub fn remap(&self, regions: &[(u64, u64, RawFd, u64)]) -> io::Result<Self> {
        let mut mapped = regions.iter().map(|&region| self.share_or_map(region)).collect::<io::Result<Vec<_>>>()?;
        mapped.sort_by_key(|region| region.start_addr());
        if let Some(pair) = mapped.windows(2).find(|pair| pair[0].last_addr() >= pair[1].start_addr()) {
            let (low, high) = (pair[0].start_addr().0, pair[1].start_addr().0);
            return Err(invalid(format!("memory regions at {low:#x} and {high:#x} overlap")));
        }
        Ok(Self(Arc::new(mapped)))
    }

    /// Fresh zeroed RAM, all of it in one memfd, at each `(guest address, size)`.
    pub fn allocate(ranges: &[(u64, u64)]) -> io::Result<Self> {
        let total = ranges
            .iter()
            .try_fold(0u64, |sum, &(_, size)| sum.checked_add(size))
            .ok_or_else(|| invalid("the sizes of the memory ranges pass 2^64".into()))?;
        // SAFETY: the name is a C string and the result is checked.
        let fd = unsafe { libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is ours and nobody else closes it.
        let file = unsafe { File::from_raw_fd(fd) };
        file.set_len(total)?;
        let mut offset = 0;
        let mut regions = Vec::with_capacity(ranges.len());
        for &(address, size) in ranges {
            regions.push((address, size, fd, offset));
            offset += size;
        }
        Self::new(&regions)
    }

    fn share_or_map(&self, (address, size, fd, offset): (u64, u64, RawFd, u64)) -> io::Result<Arc<Mapped>> {
        let is_same = |old: Region| (old.address, old.size, old.fd, old.offset) == (address, size, fd, offset);
        match self.regions().position(is_same) {
            Some(index) => Ok(self.0[index].clone()),
            None => map(address, size, duplicate(fd)?.into(), offset).map(Arc::new),
        }
    }

    /// Whether the two are references to the same.
    pub fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The regions, by rising guest address.
    pub fn regions(&self) -> impl Iterator<Item = Region> + '_ {
        self.0.iter().map(|region| {
            let file = region.file_offset();
            Region {
                address: region.start_addr().raw_value(),
                size: region.len(),
                fd: file.map_or(-1, |file| file.file().as_raw_fd()),
                offset: file.map_or(0, FileOffset::start),
                host: region.as_ptr(),
            }
        })
    }

    /// Where `address` is mapped, and how many bytes of its region follow.
    fn locate(&self, address: u64) -> Option<(*mut u8, u64)> {
        let after = self.0.partition_point(|region| region.start_addr().0 <= address);
        let region = self.0.get(after.checked_sub(1)?)?;
        let offset = address - region.start_addr().0;
        let left = region.len().checked_sub(offset).filter(|&left| left > 0)?;
        // SAFETY: `offset` is less than the length of the mapping.
        Some((unsafe { region.as_ptr().add(offset as usize) }, left))
    }

    /// The guest address of memory that `pieces` gave.
    pub fn address_of(&self, host: *const u8) -> Option<u64> {
        let inside = |region: &&Arc<Mapped>| {
            (host as u64).checked_sub(region.as_ptr() as u64).is_some_and(|offset| offset < region.len())
        };
        let region = self.0.iter().find(inside)?;
        Some(region.start_addr().0 + (host as u64 - region.as_ptr() as u64))
    }

    /// Call `each` with the host memory behind a range of guest memory, one piece per region it lies in.
    ///
    /// The pieces stay mapped as long as a clone of this object lives; the guest may change them at any time.
    #[inline]
    pub fn pieces(&self, address: u64, length: u64, mut each: impl FnMut(*mut u8, usize)) -> Result<(), GuestError> {
        let (mut at, mut left) = (address, length);
        while left > 0 {
            let (host, here) = self.locate(at).ok_or_else(|| outside(address, length))?;
            let n = left.min(here);
            each(host, n as usize);
            left -= n;
            at = match at.checked_add(n) {
                Some(next) => next,
                None if left == 0 => break,
                None => return Err(outside(address, length)),
            };
        }
        Ok(())
    }

    /// The host address of a range that must lie in one region.
    pub fn host(&self, address: u64, length: u64) -> Result<*mut u8, GuestError> {
        match self.locate(address) {
            Some((host, left)) if left >= length => Ok(host),
            _ => Err(outside(address, length)),
        }
    }

    pub fn read(&self, address: u64, out: &mut [u8]) -> Result<(), GuestError> {
        let mut done = 0;
        self.check(address, out.len() as u64)?;
        self.pieces(address, out.len() as u64, |host, n| {
            // SAFETY: `pieces` gives mapped memory, and `self` keeps it mapped.
            unsafe { VolatileSlice::new(host, n) }.copy_to(&mut out[done..done + n]);
            done += n;
        })
    }

    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), GuestError> {
        let mut done = 0;
        self.check(address, data.len() as u64)?;
        self.pieces(address, data.len() as u64, |host, n| {
            // SAFETY: `pieces` gives mapped memory, and `self` keeps it mapped.
            unsafe { VolatileSlice::new(host, n) }.copy_from(&data[done..done + n]);
            done += n;
        })
    }

    /// Whether all of a range is RAM; an empty one is.
    pub fn check(&self, address: u64, length: u64) -> Result<(), GuestError> {
        self.pieces(address, length, |_, _| ())
    }

    /// Give the whole pages in a range of RAM back to the host: they read as zeroes until they are written again.
    pub fn discard(&self, address: u64, length: u64) -> io::Result<()> {
        let (first, last) = (u128::from(address), u128::from(address) + u128::from(length));
        let (start, end) = (first.next_multiple_of(PAGE), last / PAGE * PAGE);
        for region in self.regions() {
            let low = start.max(region.address.into());
            let high = end.min(u128::from(region.address) + u128::from(region.size));
            if low < high {
                punch(region.fd, region.offset + (low as u64 - region.address), (high - low) as u64)?;
            }
        }
        Ok(())
    }

    pub fn atomic16(&self, address: u64) -> Result<&AtomicU16, GuestError> {
        // SAFETY: mapped, aligned, and only accessed atomically by this process.
        self.aligned::<u16>(address).map(|cell| unsafe { AtomicU16::from_ptr(cell) })
    }

    pub fn atomic32(&self, address: u64) -> Result<&AtomicU32, GuestError> {
        // SAFETY: as in `atomic16`.
        self.aligned::<u32>(address).map(|cell| unsafe { AtomicU32::from_ptr(cell) })
    }

    pub fn atomic64(&self, address: u64) -> Result<&AtomicU64, GuestError> {
        // SAFETY: as in `atomic16`.
        self.aligned::<u64>(address).map(|cell| unsafe { AtomicU64::from_ptr(cell) })
    }

    fn aligned<T>(&self, address: u64) -> Result<*mut T, GuestError> {
        let host = self.host(address, size_of::<T>() as u64)?.cast::<T>();
        if host.is_aligned() {
            Ok(host)
        } else {
            Err(GuestError(format!("address {address:#x} is not a multiple of {}", size_of::<T>())))
        }
    }
}

fn punch(fd: RawFd, offset: u64, length: u64) -> io::Result<()> {
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: a plain system call on a file of guest memory, where no Rust object lives.
    match unsafe { libc::fallocate(fd, mode, offset as libc::off_t, length as libc::off_t) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

fn map(address: u64, size: u64, file: File, offset: u64) -> io::Result<Mapped> {
    let region = format!("memory region of {size:#x} bytes at {address:#x}");
    let length = usize::try_from(size).map_err(|_| invalid(format!("{region} does not fit this process")))?;
    let mapping = MmapRegion::from_file(FileOffset::new(file, offset), length).map_err(|error| match error {
        vm_memory::mmap::MmapRegionError::Mmap(error) => error,
        other => invalid(format!("{region}: {other}")),
    })?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(address))
        .ok_or_else(|| invalid(format!("{region} passes the end of the address space")))?;
    Ok(Mapped { _watch: Watch::new(region.as_ptr(), length)?, region })
}

fn invalid(message: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, message)
}

fn outside(address: u64, length: u64) -> GuestError {
    GuestError(format!("{length} bytes at {address:#x} are not guest memory"))
}
