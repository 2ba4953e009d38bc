//! `DriverQueue`, `BlkLoad`, `NetLoad` and `NbdLoad`.

use std::os::fd::RawFd;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyvirtio_core::bench::{
    Alarms, BlkDriver, Fault, Geometry, Load, NbdClient, NetDriver, Outcome, QueueSetup, Transfer, CONTROL_BYTES,
};
use pyvirtio_core::RingConfig;

use crate::blk::duplicate;
use crate::errors::{os_error, ProtocolError};
use crate::memory::GuestMemory;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct DriverQueue(QueueSetup);

#[pymethods]
impl DriverQueue {
    #[new]
    #[pyo3(signature = (*, size, desc, avail, used, kick, call, connection, err, buffers, event_idx = false,
                        indirect = false, packed = false))]
    #[expect(clippy::too_many_arguments, reason = "keywords in Python")]
    fn new(
        size: u16,
        desc: u64,
        avail: u64,
        used: u64,
        kick: RawFd,
        call: RawFd,
        connection: RawFd,
        err: RawFd,
        buffers: u64,
        event_idx: bool,
        indirect: bool,
        packed: bool,
    ) -> Self {
        let ring = RingConfig { size, desc, avail, used, event_idx, indirect, packed, ..RingConfig::default() };
        Self(QueueSetup { ring, kick, call, alarms: Alarms { connection, err }, buffers })
    }
}

fn setups(queues: &[Py<DriverQueue>]) -> Vec<QueueSetup> {
    queues.iter().map(|queue| queue.get().0.clone()).collect()
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct BlkLoad(Mutex<BlkDriver>);

#[pymethods]
impl BlkLoad {
    #[classattr]
    const CONTROL_BYTES: u64 = CONTROL_BYTES;

    #[new]
    #[pyo3(signature = (memory, queues, *, block_size, blocks, iodepth))]
    fn new(
        memory: &GuestMemory,
        queues: Vec<Py<DriverQueue>>,
        block_size: u32,
        blocks: u64,
        iodepth: u16,
    ) -> PyResult<Self> {
        if queues.is_empty() || block_size == 0 || block_size % 512 != 0 {
            return Err(PyValueError::new_err(format!("{} queues, blocks of {block_size} bytes", queues.len())));
        }
        let geometry = Geometry { block_size, blocks, max_iodepth: iodepth };
        let driver = BlkDriver::new(&memory.inner, geometry, &setups(&queues));
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

/// The driver's side of network devices under load.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct NetLoad(Mutex<NetDriver>);

#[pymethods]
impl NetLoad {
    #[new]
    #[pyo3(signature = (memory, *, room, transmit, receive, first))]
    fn new(
        memory: &GuestMemory,
        room: u32,
        transmit: Vec<Py<DriverQueue>>,
        receive: Vec<Py<DriverQueue>>,
        first: u64,
    ) -> PyResult<Self> {
        let driver = NetDriver::new(&memory.inner, room, &setups(&transmit), &setups(&receive), first);
        driver.map(|driver| Self(Mutex::new(driver))).map_err(|Fault(text)| PyValueError::new_err(text))
    }

    #[pyo3(signature = (*, frame_size, seconds, burst = 32, poll = false, verify = false))]
    fn run<'py>(
        &self,
        py: Python<'py>,
        frame_size: u32,
        seconds: f64,
        burst: u16,
        poll: bool,
        verify: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        let transfer = Transfer { frame_size, burst, time: duration(seconds)?, poll, verify };
        let traffic = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).run(&transfer));
        let traffic = traffic.map_err(|Fault(text)| ProtocolError::new_err(text))?;
        let figures = counts(
            py,
            &[
                ("tx_frames", traffic.sent.frames),
                ("rx_frames", traffic.received.frames),
                ("tx_bytes", traffic.sent.bytes),
                ("rx_bytes", traffic.received.bytes),
                ("kicks", traffic.signals.kicks),
                ("interrupts", traffic.signals.interrupts),
            ],
        )?;
        figures.set_item("seconds", traffic.elapsed.as_secs_f64())?;
        Ok(figures)
    }

    #[pyo3(signature = (*, poll = false))]
    fn settle<'py>(&self, py: Python<'py>, poll: bool) -> PyResult<Bound<'py, PyDict>> {
        let verdict = py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).settle(poll));
        let verdict = verdict.map_err(|Fault(text)| ProtocolError::new_err(text))?;
        counts(
            py,
            &[
                ("lost", verdict.lost),
                ("reordered", verdict.reordered),
                ("damaged", verdict.damaged),
                ("foreign", verdict.foreign),
            ],
        )
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

fn counts<'py>(py: Python<'py>, named: &[(&str, u64)]) -> PyResult<Bound<'py, PyDict>> {
    let figures = PyDict::new(py);
    for (name, count) in named {
        figures.set_item(name, count)?;
    }
    Ok(figures)
}

fn figures<'py>(py: Python<'py>, outcome: &Outcome) -> PyResult<Bound<'py, PyDict>> {
    let figures = counts(
        py,
        &[
            ("reads", outcome.reads),
            ("writes", outcome.writes),
            ("errors", outcome.errors),
            ("kicks", outcome.signals.kicks),
            ("interrupts", outcome.signals.interrupts),
        ],
    )?;
    figures.set_item("seconds", outcome.elapsed.as_secs_f64())?;
    for (name, share) in [("p50", 0.5), ("p99", 0.99), ("p99_9", 0.999), ("max", 1.0)] {
        figures.set_item(name, outcome.latencies.quantile(share) as f64 / 1e9)?;
    }
    Ok(figures)
}
