//! Frames over a stream socket, each behind its length (QEMU's `-netdev stream`, passt).

use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::counters::Reason;
use super::header::Header;
use super::port::{Port, PortFd, Refused};
use super::segments::{copy_in, copy_out, segment, total};
use super::MAX_FRAME;
use crate::chain::Segment;

/// Bytes of the length, which is big-endian.
const PREFIX: usize = 4;
/// Bytes that are read at a time, a few frames of the usual size.
const CHUNK: usize = 64 << 10;

pub struct StreamFd {
    fd: PortFd,
    /// What the socket did not take of the last frame that was sent.
    unsent: Mutex<Vec<u8>>,
    unread: Mutex<Unread>,
}

impl StreamFd {
    /// The fd is duplicated, and made non-blocking.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        Ok(Self { fd: PortFd::new(fd)?, unsent: Mutex::default(), unread: Mutex::default() })
    }
}

impl Port for StreamFd {
    fn send(&self, _header: &Header, frame: &mut [Segment]) -> Result<(), Refused> {
        let mut unsent = lock(&self.unsent);
        flush(&self.fd, &mut unsent)?;
        let length = total(&frame[1..]);
        let mut prefix = (length as u32).to_be_bytes();
        frame[0] = segment(&mut prefix);
        let done = self.fd.write(frame).map_err(refusal)?;
        if done < PREFIX + length {
            // The rest of a frame that has begun must follow, whatever becomes of the driver meanwhile.
            unsent.resize(PREFIX + length, 0);
            copy_out(frame, &mut unsent);
            unsent.drain(..done);
        }
        Ok(())
    }

    fn receive(&self, into: &[Segment]) -> Result<(Header, usize), Refused> {
        let mut unread = lock(&self.unread);
        while unread.frame()?.is_none() {
            unread.fill(&self.fd)?;
        }
        Ok((Header::default(), unread.take(into)))
    }

    fn flush(&self) -> Result<(), Refused> {
        flush(&self.fd, &mut lock(&self.unsent))
    }

    fn fd(&self) -> RawFd {
        self.fd.raw()
    }

    fn close(&self) {
        self.fd.close();
    }
}

/// What was read and not yet taken.
#[derive(Default)]
struct Unread {
    bytes: Vec<u8>,
    start: usize,
}

impl Unread {
    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// The length of the next frame once all of it is here. After one that is too long nothing makes sense.
    fn frame(&self) -> Result<Option<usize>, Refused> {
        let Some(prefix) = self.rest().first_chunk::<PREFIX>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*prefix) as usize;
        if length > MAX_FRAME {
            return Err(Refused::Closed);
        }
        Ok((self.rest().len() >= PREFIX + length).then_some(length))
    }

    fn fill(&mut self, fd: &PortFd) -> Result<(), Refused> {
        self.bytes.drain(..self.start);
        self.start = 0;
        let had = self.bytes.len();
        self.bytes.resize(had + CHUNK, 0);
        let result = fd.read(&[segment(&mut self.bytes[had..])]);
        self.bytes.truncate(had + *result.as_ref().unwrap_or(&0));
        match result.map_err(refusal)? {
            0 => Err(Refused::Closed),
            _ => Ok(()),
        }
    }

    /// Copy the next frame, which is here, as far as it fits.
    fn take(&mut self, into: &[Segment]) -> usize {
        let length = self.frame().ok().flatten().unwrap_or(0);
        let at = self.start + PREFIX;
        copy_in(into, &self.bytes[at..at + length]);
        self.start = at + length;
        length
    }
}

fn flush(fd: &PortFd, unsent: &mut Vec<u8>) -> Result<(), Refused> {
    while !unsent.is_empty() {
        match fd.write(&[segment(unsent)]).map_err(refusal) {
            Ok(done) => drop(unsent.drain(..done)),
            Err(Refused::Busy) => return Err(Refused::Busy),
            Err(_) => unsent.clear(), // nobody is there to miss it
        }
    }
    Ok(())
}

fn refusal(error: io::Error) -> Refused {
    match error.kind() {
        io::ErrorKind::WouldBlock => Refused::Busy,
        _ => Refused::Dropped(Reason::Error),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
