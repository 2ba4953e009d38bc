//! Interrupts of a device: the ISR status with its INTx line, MSI-X vectors over irqfd (virtio 1.3, 4.1.4.5, 4.1.5.1),
//! and the call fd of vhost-user.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::sync::EventFd;

/// ISR bit of a used buffer.
pub const ISR_QUEUE: u8 = 1;
/// What a configuration change sets: QEMU sets the queue bit too, and known drivers wait for both.
pub const ISR_CONFIG: u8 = 3;

/// Where a level-triggered interrupt goes. `set` is called with a lock held and must not block.
pub trait Line: Send + Sync {
    fn set(&self, level: bool);
}

/// A line that signals an eventfd whenever it rises, for the in-process accelerator.
pub struct EventLine {
    pub rose: EventFd,
}

impl Line for EventLine {
    fn set(&self, level: bool) {
        if level {
            self.rose.signal();
        }
    }
}

/// One input of a line that devices may share: the line is high while one of its inputs is.
pub struct IrqLine {
    wire: Arc<Wire>,
    high: AtomicBool,
}

struct Wire {
    highs: Mutex<usize>,
    out: Arc<dyn Line>,
}

impl IrqLine {
    pub fn new(out: Arc<dyn Line>) -> Self {
        Self::input(Arc::new(Wire { highs: Mutex::new(0), out }))
    }

    fn input(wire: Arc<Wire>) -> Self {
        Self { wire, high: AtomicBool::new(false) }
    }

    /// A further input of the same line.
    pub fn share(&self) -> Self {
        Self::input(self.wire.clone())
    }

    /// Level of the line, whoever holds it.
    pub fn level(&self) -> bool {
        *self.wire.highs.lock().unwrap_or_else(PoisonError::into_inner) > 0
    }

    pub fn set(&self, level: bool) {
        let mut highs = self.wire.highs.lock().unwrap_or_else(PoisonError::into_inner);
        if self.high.swap(level, SeqCst) == level {
            return;
        }
        let before = *highs;
        *highs = if level { before + 1 } else { before - 1 };
        if (before > 0) != (*highs > 0) {
            self.wire.out.set(level);
        }
    }
}

impl Drop for IrqLine {
    fn drop(&mut self) {
        self.set(false);
    }
}

/// The ISR status of one device and its INTx line.
pub struct Isr {
    state: Mutex<IsrState>,
    line: Arc<IrqLine>,
}

struct IsrState {
    bits: u8,
    intx_enabled: bool,
}

impl Isr {
    /// INTx starts enabled, as after a reset.
    pub fn new(line: Arc<IrqLine>) -> Self {
        Self { state: Mutex::new(IsrState { bits: 0, intx_enabled: true }), line }
    }

    /// Change the state and make the line follow, under one lock: a post between a read's two steps would be lost.
    fn update<T>(&self, change: impl FnOnce(&mut IsrState) -> T) -> T {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let result = change(&mut state);
        self.line.set(state.intx_enabled && state.bits != 0);
        result
    }

    pub fn post(&self, bits: u8) {
        self.update(|state| state.bits |= bits);
    }

    /// Return the bits, clear them and lower the line.
    pub fn read(&self) -> u8 {
        self.update(|state| std::mem::take(&mut state.bits))
    }

    pub fn peek(&self) -> u8 {
        self.update(|state| state.bits)
    }

    pub fn intx_enabled(&self) -> bool {
        self.update(|state| state.intx_enabled)
    }

    pub fn set_intx_enabled(&self, enabled: bool) {
        self.update(|state| state.intx_enabled = enabled);
    }
}

/// One MSI-X vector: an eventfd that KVM takes as irqfd, and its mask and pending bits.
pub struct MsixVector {
    pub irqfd: EventFd,
    masked: AtomicBool,
    pending: AtomicBool,
}

impl MsixVector {
    /// Starts unmasked.
    pub fn new() -> io::Result<Self> {
        Ok(Self { irqfd: EventFd::new()?, masked: AtomicBool::new(false), pending: AtomicBool::new(false) })
    }

    pub fn signal(&self) {
        if !self.masked.load(SeqCst) {
            self.irqfd.signal();
            return;
        }
        self.pending.store(true, SeqCst);
        // Unmasked in between: nobody else would deliver what was just stored.
        if !self.masked.load(SeqCst) {
            self.deliver();
        }
    }

    fn deliver(&self) {
        if self.pending.swap(false, SeqCst) {
            self.irqfd.signal();
        }
    }

    pub fn masked(&self) -> bool {
        self.masked.load(SeqCst)
    }

    /// Unmasking delivers what is pending.
    pub fn set_masked(&self, masked: bool) {
        self.masked.store(masked, SeqCst);
        if !masked {
            self.deliver();
        }
    }

    pub fn pending(&self) -> bool {
        self.pending.load(SeqCst)
    }

    pub fn set_pending(&self, pending: bool) {
        self.pending.store(pending, SeqCst);
    }
}

/// A file descriptor of a vhost-user front-end that is written to instead of an interrupt: an eventfd, pipe or socket.
///
/// It becomes non-blocking. The front-end shares what it refers to, though, and may undo that.
pub struct CallFd {
    fd: OwnedFd,
    socket: bool,
    /// Threads that are in `signal`.
    inside: AtomicUsize,
    wary: AtomicBool,
}

/// How often, and with which pauses, `let_go` looks whether a thread is stuck.
const LOOKS: u32 = 100;
const PAUSE: Duration = Duration::from_millis(1);

impl CallFd {
    /// Duplicates the fd.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        let fd = crate::sync::duplicate(fd)?;
        let kind = std::fs::File::from(fd.try_clone()?).metadata()?.file_type();
        if kind.is_file() || kind.is_dir() || kind.is_block_device() || kind.is_char_device() {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let fd = if kind.is_fifo() { reopened(&fd).unwrap_or(fd) } else { fd };
        // SAFETY: plain system calls on an fd of ours.
        let set = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
        };
        if set {
            Ok(Self { fd, socket: kind.is_socket(), inside: AtomicUsize::new(0), wary: AtomicBool::new(false) })
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Blocks only on an eventfd that a hostile front-end has filled, until `let_go`. Where there is no room, the
    /// front-end has something to read already.
    pub fn signal(&self) {
        self.inside.fetch_add(1, SeqCst);
        if !self.wary.load(SeqCst) || self.has_room() {
            self.write();
        }
        self.inside.fetch_sub(1, SeqCst);
    }

    fn write(&self) {
        let one = 1u64.to_ne_bytes();
        let (fd, at) = (self.fd.as_raw_fd(), one.as_ptr().cast());
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        // SAFETY: reads 8 bytes of ours; the result says nothing that could be acted upon.
        unsafe {
            if self.socket {
                libc::send(fd, at, one.len(), flags)
            } else {
                libc::write(fd, at, one.len())
            }
        };
    }

    fn has_room(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
        // SAFETY: one pollfd, for the time of the call.
        unsafe { libc::poll(&mut poll, 1, 0) == 1 }
    }

    /// The front-end is gone, or is to go: see that no thread goes on waiting for it in `signal`. Any thread.
    pub fn let_go(&self) {
        self.wary.store(true, SeqCst);
        let mut looks = 0;
        while self.inside.load(SeqCst) > 0 {
            looks += 1;
            if looks > LOOKS {
                self.make_room();
            }
            std::thread::sleep(PAUSE);
        }
    }

    fn make_room(&self) {
        let mut count = [0u8; 8];
        let into = libc::iovec { iov_base: count.as_mut_ptr().cast(), iov_len: count.len() };
        // SAFETY: one buffer of ours, for the time of the call; an eventfd that is empty is left alone.
        unsafe { libc::preadv2(self.fd.as_raw_fd(), &into, 1, -1, libc::RWF_NOWAIT) };
    }
}

/// The same pipe, in an open file that the front-end does not share.
fn reopened(fd: &OwnedFd) -> Option<OwnedFd> {
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let file = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path);
    file.ok().map(OwnedFd::from)
}

/// What tells the driver.
#[derive(Clone)]
pub enum Interrupt {
    /// The ISR status always, and a vector if one is assigned.
    Pci {
        isr: Arc<Isr>,
        bits: u8,
        vector: Option<Arc<MsixVector>>,
    },
    Call(Arc<CallFd>),
}

impl Interrupt {
    pub fn signal(&self) {
        match self {
            Self::Pci { isr, bits, vector } => {
                isr.post(*bits);
                if let Some(vector) = vector {
                    vector.signal();
                }
            }
            Self::Call(call) => call.signal(),
        }
    }
}
