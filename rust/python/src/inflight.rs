//! `InflightRegion`.

use pyo3::prelude::*;

use crate::errors::guest_error;
use crate::memory::GuestMemory;

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct InflightRegion {
    pub inner: pyvirtio_core::InflightRegion,
}

#[pymethods]
impl InflightRegion {
    #[new]
    fn new(memory: &GuestMemory, at: u64, entries: u16) -> Self {
        Self { inner: pyvirtio_core::InflightRegion { memory: memory.inner.clone(), at, entries } }
    }

    fn clear(&self) -> PyResult<()> {
        self.inner.clear().map_err(guest_error)
    }

    #[staticmethod]
    fn bytes(entries: u16) -> u64 {
        pyvirtio_core::InflightRegion::bytes(entries)
    }
}
