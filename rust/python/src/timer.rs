//! `Timer`.

use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::os_error;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Timer(pyvirtio_core::Timer);

fn seconds(value: f64) -> PyResult<Duration> {
    Duration::try_from_secs_f64(value).map_err(|error| PyValueError::new_err(format!("{value} s: {error}")))
}

#[pymethods]
impl Timer {
    #[new]
    fn new() -> PyResult<Self> {
        pyvirtio_core::Timer::new().map(Self).map_err(os_error)
    }

    #[getter]
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    #[pyo3(signature = (first, interval = 0.0))]
    fn start(&self, first: f64, interval: f64) -> PyResult<()> {
        self.0.start(seconds(first)?, seconds(interval)?);
        Ok(())
    }

    fn stop(&self) {
        self.0.stop();
    }

    fn take(&self) -> u64 {
        self.0.take()
    }
}
