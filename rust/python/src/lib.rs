//! `pyvirtio._core`: the core as Python sees it. Converts types, errors and threads, and decides nothing.

use pyo3::prelude::*;

mod bench;
mod blk;
mod buffer;
mod bytes;
mod chain;
mod device_state;
mod dirty_log;
mod errors;
mod handler;
mod inflight;
mod interrupt;
mod iothread;
mod kvm;
mod logging;
mod memory;
mod net;
mod queue;
mod tap;
mod timer;

#[pymodule]
mod _core {
    #[pymodule_export]
    use crate::bench::{BlkLoad, DriverQueue, NbdLoad, NetLoad};
    #[pymodule_export]
    use crate::blk::{io_uring_missing, BlkPlane, FileIo, NullIo};
    #[pymodule_export]
    use crate::chain::Chain;
    #[pymodule_export]
    use crate::device_state::DeviceState;
    #[pymodule_export]
    use crate::dirty_log::DirtyLog;
    #[pymodule_export]
    use crate::inflight::InflightRegion;
    #[pymodule_export]
    use crate::interrupt::{CallFd, IrqLine, Isr, MsixVector};
    #[pymodule_export]
    use crate::iothread::{IoThread, Kick, Watch};
    #[pymodule_export]
    use crate::kvm::{supported, Serial, Vcpu, Vm};
    #[pymodule_export]
    use crate::memory::GuestMemory;
    #[pymodule_export]
    use crate::net::NetPlane;
    #[pymodule_export]
    use crate::queue::VirtQueue;
    #[pymodule_export]
    use crate::tap::Completed;
    #[pymodule_export]
    use crate::timer::Timer;

    use pyo3::prelude::*;

    #[pyfunction]
    fn tsc() -> u64 {
        pyvirtio_core::tsc()
    }
}
