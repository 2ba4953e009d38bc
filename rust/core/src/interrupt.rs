//! Interrupts of a device: the ISR status with its INTx line, MSI-X vectors over irqfd (virtio 1.3, 4.1.4.5, 4.1.5.1),
//! and the call fd of vhost-user.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{Arc, Mutex, PoisonError};

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
pub struct CallFd(OwnedFd);

impl CallFd {
    /// Duplicates the fd. What it refers to, which the front-end shares, becomes non-blocking.
    pub fn new(fd: RawFd) -> io::Result<Self> {
        let fd = crate::sync::duplicate(fd)?;
        // SAFETY: plain system calls on an fd of ours.
        let set = unsafe {
            let flags = libc::fcntl(fd.as_raw_fd(), libc::F_GETFL);
            flags >= 0 && libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) >= 0
        };
        if set {
            Ok(Self(fd))
        } else {
            Err(io::Error::last_os_error())
        }
    }

    /// Never blocks: where there is no room, the front-end has something to read already.
    pub fn signal(&self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: writes 8 bytes of ours; the result says nothing that could be acted upon.
        unsafe { libc::write(self.0.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
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
