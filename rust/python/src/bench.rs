//! `BlkLoad` and `NbdLoad`.

use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyvirtio_core::bench::{Alarms, Driver, Fault, Geometry, Load, NbdClient, Outcome, QueueSetup, CONTROL_BYTES};
use pyvirtio_core::RingConfig;

use crate::blk::duplicate;
use crate::errors::{os_error, ProtocolError};
use crate::memory::GuestMemory;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct BlkLoad(Mutex<Driver>);

/// Size, descriptor table, avail ring, used ring, kick fd, call fd, buffers.
type Queue = (u16, u64, u64, u64, RawFd, RawFd, u64);

#[pymethods]
impl BlkLoad {
    #[classattr]
    const CONTROL_BYTES: u64 = CONTROL_BYTES;

    #[new]
    #[pyo3(signature = (memory, queues, *, connection, err, block_size, blocks, iodepth, event_idx = false, indirect = false,
                        packed = false))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        memory: &GuestMemory,
        queues: Vec<Queue>,
        connection: RawFd,
        err: RawFd,
        block_size: u32,
        blocks: u64,
        iodepth: u16,
        event_idx: bool,
        indirect: bool,
        packed: bool,
    ) -> PyResult<Self> {
        if queues.is_empty() || block_size == 0 || block_size % 512 != 0 {
            return Err(PyValueError::new_err(format!("{} queues, blocks of {block_size} bytes", queues.len())));
        }
        let setup = |(size, desc, avail, used, kick, call, buffers)| QueueSetup {
            ring: RingConfig { size, desc, avail, used, event_idx, indirect, packed, ..RingConfig::default() },
            kick,
            call,
            buffers,
        };
        let geometry = Geometry { block_size, blocks, max_iodepth: iodepth, alarms: Alarms { connection, err } };
        let driver = Driver::new(&memory.inner, geometry, queues.into_iter().map(setup).collect());
        driver.map(|driver| Self(Mutex::new(driver))).map_err(|Fault(text)| PyValueError::new_err(text))
    }

    #[pyo3(signature = (*, write_percent = 0, random = true, iodepth = 1, seconds = 3600.0, requests = u64::MAX,
                        poll = false, verify = false, seed = 1))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn run<'py>(
        &self,
        py: Python<'py>,
        write_percent: u8,
        random: bool,
        iodepth: u16,
        seconds: f64,
        requests: u64,
        poll: bool,
        verify: bool,
        seed: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let time = duration(seconds)?;
        let load = Load { write_percent, random, iodepth, time, requests, poll, verify, seed };
        let outcome = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).run(&load));
        figures(py, &outcome.map_err(|Fault(text)| ProtocolError::new_err(text))?)
    }
}

/// The client of an NBD server under load.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct NbdLoad(Mutex<NbdClient>);

#[pymethods]
impl NbdLoad {
    #[new]
    #[pyo3(signature = (fd, *, block_size, blocks))]
    fn new(fd: RawFd, block_size: u32, blocks: u64) -> PyResult<Self> {
        if block_size == 0 || blocks == 0 {
            return Err(PyValueError::new_err(format!("{blocks} blocks of {block_size} bytes")));
        }
        let client = NbdClient::new(duplicate(fd)?, block_size, blocks).map_err(os_error)?;
        Ok(Self(Mutex::new(client)))
    }

    #[pyo3(signature = (*, write_percent = 0, random = true, iodepth = 1, seconds = 3600.0, requests = u64::MAX,
                        seed = 1))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn run<'py>(
        &self,
        py: Python<'py>,
        write_percent: u8,
        random: bool,
        iodepth: u16,
        seconds: f64,
        requests: u64,
        seed: u64,
    ) -> PyResult<Bound<'py, PyDict>> {
        let time = duration(seconds)?;
        let load = Load { write_percent, random, iodepth, time, requests, poll: false, verify: false, seed };
        let outcome = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).run(&load));
        figures(py, &outcome.map_err(|Fault(text)| ProtocolError::new_err(text))?)
    }
}

fn duration(seconds: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(seconds).map_err(|error| PyValueError::new_err(error.to_string()))
}

fn figures<'py>(py: Python<'py>, outcome: &Outcome) -> PyResult<Bound<'py, PyDict>> {
    let figures = PyDict::new(py);
    for (name, count) in [
        ("reads", outcome.reads),
        ("writes", outcome.writes),
        ("errors", outcome.errors),
        ("kicks", outcome.kicks),
        ("interrupts", outcome.interrupts),
    ] {
        figures.set_item(name, count)?;
    }
    figures.set_item("seconds", outcome.elapsed.as_secs_f64())?;
    for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99_9", 0.999), ("max", 1.0)] {
        figures.set_item(name, outcome.latencies.quantile(share) as f64 / 1e9)?;
    }
    Ok(figures)
}
