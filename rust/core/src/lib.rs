//! Guest memory, virtqueues, I/O threads and KVM: what is hot, shared with a guest, or unsafe.
//!
//! The crate knows no Python. A guest is trusted with nothing: every value it shares is read once and checked, and
//! nothing it writes can panic, hang or grow this process.

pub mod bench;
pub mod chain;
pub mod counters;
pub mod device_state;
pub mod dirty_log;
pub mod interrupt;
pub mod iothread;
pub mod kvm;
pub mod memory;
pub mod planes;
pub mod queue;
mod sigbus;
pub mod sync;
pub mod timer;
mod tsc;
pub mod watch;

pub use chain::{Chain, ChainError};
pub use device_state::DeviceState;
pub use dirty_log::DirtyLog;
pub use interrupt::{CallFd, Interrupt, IrqLine, Isr, Line, MsixVector};
pub use iothread::IoThread;
pub use memory::GuestMemory;
pub use queue::tap::{Completed, Tap};
pub use queue::{Handler, InflightRegion, RingConfig, VirtQueue};
pub use timer::Timer;
pub use tsc::tsc;
pub use watch::{Watch, Watcher};

/// The guest broke the rules of virtio; the text names the thing, the value and the limit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestError(pub String);

impl std::fmt::Display for GuestError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for GuestError {}
