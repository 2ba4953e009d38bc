//! The block backend for a raw file or block device: guest memory is read and written in place.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::aligned::{is_aligned, AlignedBuffer};
use super::blk::{Backend, Buffers, Failure};
use super::transfer::PIECE;
use crate::chain::Segment;

const PUNCH_HOLE: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
/// Bytes of zeroes that are written at once.
const ZEROES: usize = 64 << 10;

/// Buffers that one preadv takes.
pub const IOV_MAX: usize = 1024;

/// A file, or a further reference to it.
#[derive(Clone)]
pub struct FileBackend {
    file: Arc<File>,
    align: usize,
}

impl FileBackend {
    /// `align` is what addresses, lengths and offsets of an O_DIRECT file have to be multiples of; else it is 1.
    pub fn new(file: File, align: usize) -> Self {
        Self { file: Arc::new(file), align: align.max(1).next_power_of_two() }
    }

    /// Whether the file takes these buffers as they are.
    pub fn takes(&self, segments: &[Segment]) -> bool {
        is_aligned(segments, self.align)
    }

    /// A buffer of ours in place of the front of the driver's, which the file does not take.
    fn bounce(&self, buffers: &Buffers<'_>) -> AlignedBuffer {
        AlignedBuffer::new(buffers.total().min(PIECE), self.align)
    }

    /// Read into mapped memory, which a guest may change under everybody's feet.
    fn preadv(&self, segments: &[Segment], offset: u64) -> io::Result<usize> {
        let (fd, at) = (self.as_raw_fd(), offset as i64);
        match segments {
            // SAFETY: who calls keeps the segments mapped.
            [one] => retry(|| unsafe { libc::pread(fd, one.iov_base, one.iov_len, at) }),
            // SAFETY: as above.
            many => retry(|| unsafe { libc::preadv(fd, many.as_ptr(), many.len().min(IOV_MAX) as i32, at) }),
        }
    }

    fn pwritev(&self, segments: &[Segment], offset: u64) -> io::Result<usize> {
        let (fd, at) = (self.as_raw_fd(), offset as i64);
        match segments {
            // SAFETY: as in `preadv`.
            [one] => retry(|| unsafe { libc::pwrite(fd, one.iov_base, one.iov_len, at) }),
            // SAFETY: as in `preadv`.
            many => retry(|| unsafe { libc::pwritev(fd, many.as_ptr(), many.len().min(IOV_MAX) as i32, at) }),
        }
    }

    fn fallocate(&self, mode: i32, length: u64, offset: u64) -> io::Result<()> {
        // SAFETY: no memory is involved.
        retry(|| unsafe { libc::fallocate(self.as_raw_fd(), mode, offset as i64, length as i64) as isize })?;
        Ok(())
    }

    fn write_plain_zeroes(&self, length: u64, offset: u64) -> io::Result<()> {
        let zeroes = AlignedBuffer::new(ZEROES.min(length as usize), self.align);
        let end = offset + length;
        let mut at = offset;
        while at < end {
            let n = (end - at).min(zeroes.len() as u64);
            self.file.write_all_at(&zeroes[..n as usize], at)?;
            at += n;
        }
        Ok(())
    }
}

impl AsRawFd for FileBackend {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl Backend for FileBackend {
    fn read(&self, into: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        if self.takes(into.segments) {
            return Ok(self.preadv(into.segments, offset)?);
        }
        let mut bounce = self.bounce(into);
        let done = self.preadv(&[bounce.segment()], offset)?;
        Ok(into.fill(&bounce[..done]))
    }

    fn write(&self, from: &Buffers<'_>, offset: u64) -> Result<usize, Failure> {
        if self.takes(from.segments) {
            return Ok(self.pwritev(from.segments, offset)?);
        }
        let mut bounce = self.bounce(from);
        from.gather(&mut bounce);
        Ok(self.pwritev(&[bounce.segment()], offset)?)
    }

    fn flush(&self) -> Result<(), Failure> {
        Ok(self.file.sync_data()?)
    }

    /// A hint: a file system without holes has done enough.
    fn discard(&self, length: u64, offset: u64) -> Result<(), Failure> {
        match self.fallocate(PUNCH_HOLE, length, offset) {
            Err(error) if is_unsupported(&error) => Ok(()),
            result => Ok(result?),
        }
    }

    fn write_zeroes(&self, length: u64, offset: u64, unmap: bool) -> Result<(), Failure> {
        let modes: &[i32] = if unmap { &[PUNCH_HOLE, ZERO_RANGE] } else { &[ZERO_RANGE] };
        for mode in modes {
            match self.fallocate(*mode, length, offset) {
                Err(error) if is_unsupported(&error) => (),
                result => return Ok(result?),
            }
        }
        Ok(self.write_plain_zeroes(length, offset)?)
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

/// The result of a system call that was not interrupted.
pub(super) fn retry(mut call: impl FnMut() -> isize) -> io::Result<usize> {
    loop {
        match usize::try_from(call()) {
            Ok(n) => return Ok(n),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::FromRawFd;

    use super::*;

    const CAPACITY: usize = 1 << 20;

    /// On tmpfs, which punches holes but knows no FALLOC_FL_ZERO_RANGE.
    fn disk_of_ones() -> FileBackend {
        // SAFETY: the name is a C string.
        let fd = unsafe { libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC) };
        assert!(fd >= 0);
        // SAFETY: `fd` is open and nobody else's.
        let file = unsafe { File::from_raw_fd(fd) };
        file.write_all_at(&[1; CAPACITY], 0).unwrap();
        FileBackend::new(file, 1)
    }

    fn assert_zeroes_are_only_at(disk: &FileBackend, zeroes: std::ops::Range<usize>) {
        let mut content = vec![0; CAPACITY];
        disk.file.read_exact_at(&mut content, 0).unwrap();
        let expected: Vec<u8> = (0..CAPACITY).map(|at| u8::from(!zeroes.contains(&at))).collect();
        assert!(content == expected);
    }

    #[test]
    fn zeroes_are_written_where_the_file_system_cannot_make_them() {
        let disk = disk_of_ones();
        assert!(disk.fallocate(ZERO_RANGE, 512, 0).is_err_and(|error| is_unsupported(&error)));
        disk.write_zeroes(200_192, 512, false).unwrap();
        assert_zeroes_are_only_at(&disk, 512..200_704);
    }

    #[test]
    fn zeroes_that_may_be_unmapped_become_a_hole() {
        let disk = disk_of_ones();
        disk.write_zeroes(8192, 4096, true).unwrap();
        assert_zeroes_are_only_at(&disk, 4096..12288);
    }

    #[test]
    fn a_discard_leaves_zeroes_and_the_size() {
        let disk = disk_of_ones();
        disk.discard(8192, CAPACITY as u64 - 8192).unwrap();
        assert_zeroes_are_only_at(&disk, CAPACITY - 8192..CAPACITY);
    }
}
