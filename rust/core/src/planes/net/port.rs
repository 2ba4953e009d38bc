//! Where the frames of one queue pair go, and where those for it come from.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::{PoisonError, RwLock};

use super::counters::Reason;
use super::header::{Header, HEADER};
use super::segments::segment;
use crate::chain::Segment;
use crate::planes::file::retry;
use crate::sync::duplicate;

/// Why a frame did not go through.
#[derive(Debug, PartialEq, Eq)]
pub enum Refused {
    /// Not now: the frame stays where it is until the port's file descriptor is ready again.
    Busy,
    /// This frame is lost; the next may pass.
    Dropped(Reason),
    /// Nothing comes any more, until the driver's next kick at least.
    Closed,
    /// The port is wrong, not the frame: the device breaks, with this reason.
    Broken(String),
}

/// One end of a network. `send` and `receive` are each called by one thread at a time, and never block.
pub trait Port: Send + Sync {
    /// Send the frame in all segments but the first, which is the port's to use for what stands in front.
    fn send(&self, header: &Header, frame: &mut [Segment]) -> Result<(), Refused>;

    /// Take the next frame: its header, the frame itself into the segments, and its length.
    ///
    /// One that fills them to the last byte may have been longer.
    fn receive(&self, into: &[Segment]) -> Result<(Header, usize), Refused>;

    /// Send what is left of a frame that was sent in part; `Busy` while there is some.
    fn flush(&self) -> Result<(), Refused> {
        Ok(())
    }

    /// Forget the frames of this process that wait to be received; return how many those were.
    fn discard(&self) -> usize {
        0
    }

    /// Readable when a frame may have come, and writable when one may be sent.
    fn fd(&self) -> RawFd;

    /// Give back what it holds of the host: no frame passes any more.
    fn close(&self) {}
}

/// A non-blocking file descriptor until it is closed, which may happen while others still know of it.
pub struct PortFd(RwLock<Option<OwnedFd>>);

impl PortFd {
    /// The fd is duplicated, and made non-blocking.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        nonblocking(fd).map(|fd| Self(RwLock::new(Some(fd))))
    }

    fn with<T>(&self, call: impl FnMut(RawFd) -> T) -> Option<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).as_ref().map(AsRawFd::as_raw_fd).map(call)
    }

    /// Write all segments, or as much as a stream takes.
    pub fn write(&self, from: &[Segment]) -> io::Result<usize> {
        // SAFETY: the caller's segments are mapped, and guest memory may change under everybody's feet.
        self.with(|fd| retry(|| unsafe { libc::writev(fd, from.as_ptr(), from.len() as i32) })).unwrap_or_else(closed)
    }

    pub fn read(&self, into: &[Segment]) -> io::Result<usize> {
        // SAFETY: as in `write`.
        self.with(|fd| retry(|| unsafe { libc::readv(fd, into.as_ptr(), into.len() as i32) })).unwrap_or_else(closed)
    }

    /// -1 once it is closed.
    pub fn raw(&self) -> RawFd {
        self.with(|fd| fd).unwrap_or(-1)
    }

    pub fn close(&self) {
        drop(self.0.write().unwrap_or_else(PoisonError::into_inner).take());
    }
}

fn closed() -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(libc::EBADF))
}

/// A tap device, or a socket that keeps messages apart: a frame for each read and write.
pub struct FrameFd {
    fd: PortFd,
    /// A `struct virtio_net_hdr` of 12 bytes stands before each frame.
    header: bool,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Device,
    /// An empty message is one, and an error is over once it was reported.
    Datagrams,
    /// An empty message is the end.
    Messages,
}

impl FrameFd {
    /// The fd is duplicated, and made non-blocking.
    pub fn new(fd: RawFd, header: bool) -> io::Result<Self> {
        let kind = match socket_type(fd) {
            None => Kind::Device,
            Some(libc::SOCK_DGRAM) => Kind::Datagrams,
            Some(_) => Kind::Messages,
        };
        Ok(Self { fd: PortFd::new(fd)?, header, kind })
    }

    fn header_from(&self, raw: &[u8; HEADER], length: usize) -> Result<(Header, usize), Refused> {
        match (self.header, length.checked_sub(HEADER)) {
            (false, _) => Ok((Header::default(), length)),
            (true, Some(length)) => Ok((Header::parse(raw), length)),
            (true, None) => Err(Refused::Dropped(Reason::Header)),
        }
    }
}

impl Port for FrameFd {
    fn send(&self, header: &Header, frame: &mut [Segment]) -> Result<(), Refused> {
        let mut raw = header.bytes(0);
        frame[0] = segment(&mut raw);
        match self.fd.write(&frame[usize::from(!self.header)..]) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Refused::Busy),
            Err(_) => Err(Refused::Dropped(Reason::Error)),
        }
    }

    fn receive(&self, into: &[Segment]) -> Result<(Header, usize), Refused> {
        let mut raw = [0; HEADER];
        let read = if self.header { read_behind(&self.fd, &mut raw, into) } else { self.fd.read(into) };
        match read {
            Ok(0) if self.kind == Kind::Messages => Err(Refused::Closed),
            Ok(length) => self.header_from(&raw, length),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(Refused::Busy),
            Err(_) if self.kind == Kind::Device => Err(Refused::Closed),
            Err(_) => Err(Refused::Dropped(Reason::Error)),
        }
    }

    fn fd(&self) -> RawFd {
        self.fd.raw()
    }

    fn close(&self) {
        self.fd.close();
    }
}

fn nonblocking(fd: RawFd) -> io::Result<OwnedFd> {
    let fd = duplicate(fd)?;
    // SAFETY: no memory is involved.
    let flags = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_GETFL) };
    // SAFETY: as above.
    if flags < 0 || unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

fn socket_type(fd: RawFd) -> Option<i32> {
    let (mut kind, mut length) = (0, size_of::<i32>() as u32);
    let at = std::ptr::from_mut(&mut kind).cast();
    // SAFETY: `kind` has the size that `length` says.
    let result = unsafe { libc::getsockopt(fd, libc::SOL_SOCKET, libc::SO_TYPE, at, &mut length) };
    (result == 0).then_some(kind)
}

fn read_behind(fd: &PortFd, header: &mut [u8; HEADER], into: &[Segment]) -> io::Result<usize> {
    let mut all = smallvec::SmallVec::<[Segment; 8]>::new();
    all.push(segment(header));
    all.extend_from_slice(into);
    fd.read(&all)
}
