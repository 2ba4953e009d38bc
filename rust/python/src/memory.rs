//! `GuestMemory`.

use std::os::fd::RawFd;
use std::sync::atomic::Ordering;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::{PyBytes, PyDict, PyMemoryView, PySlice};
use pyvirtio_core::memory::Region;

use crate::bytes::with_bytes;
use crate::errors::{guest_error, os_error};

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct GuestMemory {
    pub inner: pyvirtio_core::GuestMemory,
    /// Python's own mapping of each region, made when it is first asked for.
    views: Vec<(Region, PyOnceLock<Py<PyAny>>)>,
}

// SAFETY: `Region::host` leads to shared memory and is not used here.
unsafe impl Send for GuestMemory {}
// SAFETY: as above.
unsafe impl Sync for GuestMemory {}

impl From<pyvirtio_core::GuestMemory> for GuestMemory {
    fn from(inner: pyvirtio_core::GuestMemory) -> Self {
        let views = inner.regions().map(|region| (region, PyOnceLock::new())).collect();
        Self { inner, views }
    }
}

#[pymethods]
impl GuestMemory {
    #[new]
    fn new(regions: Vec<(u64, u64, RawFd, u64)>) -> PyResult<Self> {
        pyvirtio_core::GuestMemory::new(&regions).map(Self::from).map_err(os_error)
    }

    #[staticmethod]
    fn allocate(ranges: Vec<(u64, u64)>) -> PyResult<Self> {
        pyvirtio_core::GuestMemory::allocate(&ranges).map(Self::from).map_err(os_error)
    }

    fn remap(&self, regions: Vec<(u64, u64, RawFd, u64)>) -> PyResult<Self> {
        self.inner.remap(&regions).map(Self::from).map_err(os_error)
    }

    #[getter]
    fn regions(&self) -> Vec<(u64, u64, RawFd, u64)> {
        self.views.iter().map(|(region, _)| (region.address, region.size, region.fd, region.offset)).collect()
    }

    fn read<'py>(&self, py: Python<'py>, address: u64, length: u64) -> PyResult<Bound<'py, PyBytes>> {
        self.inner.check(address, length).map_err(guest_error)?;
        PyBytes::new_with(py, length as usize, |out| self.inner.read(address, out).map_err(guest_error))
    }

    fn write(&self, address: u64, data: &Bound<'_, PyAny>) -> PyResult<()> {
        with_bytes(data, |data| self.inner.write(address, data))?.map_err(guest_error)
    }

    fn load16(&self, address: u64) -> PyResult<u16> {
        let cell = self.inner.atomic16(address).map_err(guest_error)?;
        Ok(u16::from_le(cell.load(Ordering::SeqCst)))
    }

    fn store16(&self, address: u64, value: u16) -> PyResult<()> {
        let cell = self.inner.atomic16(address).map_err(guest_error)?;
        cell.store(value.to_le(), Ordering::SeqCst);
        Ok(())
    }

    fn view<'py>(&self, py: Python<'py>, address: u64, length: u64) -> PyResult<Bound<'py, PyAny>> {
        self.inner.host(address, length).map_err(guest_error)?;
        let (region, mapping) = self
            .views
            .iter()
            .find(|(region, _)| address >= region.address && address - region.address < region.size)
            .ok_or_else(|| PyValueError::new_err("the range lies in no region"))?;
        let mapping = mapping.get_or_try_init(py, || map(py, region))?;
        let start = (address - region.address) as isize;
        PyMemoryView::from(mapping.bind(py))?.get_item(PySlice::new(py, start, start + length as isize, 1))
    }

    fn __repr__(&self) -> String {
        let regions: Vec<String> =
            self.inner.regions().map(|region| format!("{:#x}+{:#x}", region.address, region.size)).collect();
        format!("<GuestMemory {}>", regions.join(" "))
    }
}

/// Python's mapping keeps a duplicate of the fd and unmaps when its last view is gone.
fn map(py: Python<'_>, region: &Region) -> PyResult<Py<PyAny>> {
    let options = PyDict::new(py);
    options.set_item("offset", region.offset)?;
    let mapping = py.import("mmap")?.getattr("mmap")?.call((region.fd, region.size), Some(&options))?;
    Ok(mapping.unbind())
}
