//! A network without a file descriptor: frames for the driver come from this process, those it sends go nowhere.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::header::Header;
use super::port::{Port, Refused};
use super::segments::copy_in;
use crate::chain::Segment;
use crate::sync::EventFd;

/// Frames that wait for the driver at most.
const CAPACITY: usize = 1024;

pub struct Inbox {
    frames: Mutex<VecDeque<Box<[u8]>>>,
    /// Signalled while there are frames.
    filled: EventFd,
}

impl Inbox {
    pub fn new() -> io::Result<Self> {
        Ok(Self { frames: Mutex::default(), filled: EventFd::new()? })
    }

    fn frames(&self) -> MutexGuard<'_, VecDeque<Box<[u8]>>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Queue frames for the driver, from any thread; return how many there was room for.
    pub fn push(&self, new: impl IntoIterator<Item = Box<[u8]>>) -> usize {
        let mut frames = self.frames();
        let before = frames.len();
        frames.extend(new.into_iter().take(CAPACITY - before));
        if before == 0 && !frames.is_empty() {
            self.filled.signal();
        }
        frames.len() - before
    }
}

impl Port for Inbox {
    fn send(&self, _header: &Header, _frame: &mut [Segment]) -> Result<(), Refused> {
        Ok(())
    }

    fn receive(&self, into: &[Segment]) -> Result<(Header, usize), Refused> {
        let mut frames = self.frames();
        let Some(frame) = frames.pop_front() else {
            self.filled.take();
            return Err(Refused::Busy);
        };
        drop(frames);
        copy_in(into, &frame);
        Ok((Header::default(), frame.len()))
    }

    fn discard(&self) -> usize {
        let mut frames = self.frames();
        self.filled.take();
        std::mem::take(&mut *frames).len()
    }

    fn fd(&self) -> RawFd {
        self.filled.as_raw_fd()
    }
}
