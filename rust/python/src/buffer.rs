//! Guest memory as memoryviews: the buffers of a request, in place.

use std::cell::RefCell;
use std::ffi::c_int;

use pyo3::ffi;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::types::{PyList, PyMemoryView};
use pyvirtio_core::chain::Segment;
use pyvirtio_core::memory::GuestMemory;

/// A view of each segment that is not empty. `release` them when they are no longer valid.
pub fn views<'py>(
    py: Python<'py>,
    memory: &GuestMemory,
    segments: &[Segment],
    writable: bool,
) -> PyResult<Bound<'py, PyList>> {
    let views = PyList::empty(py);
    for segment in segments.iter().filter(|segment| segment.iov_len > 0) {
        let start = segment.iov_base as usize;
        let exporter = GuestBuffer { _memory: memory.clone(), start, length: segment.iov_len, writable };
        views.append(PyMemoryView::from(Bound::new(py, exporter)?.as_any())?)?;
    }
    Ok(views)
}

pub fn release(views: &Bound<'_, PyList>) {
    for view in views {
        // Refused while somebody has a view of the view; the exporter keeps the memory mapped then.
        let _ = view.call_method0(intern!(views.py(), "release"));
    }
}

/// Take the views back when the handler that runs returns; whoever got the list may change it.
pub fn lend(views: &Bound<'_, PyList>) {
    let copy = views.get_slice(0, views.len()).unbind();
    LENT.with_borrow_mut(|lent| lent.push(copy));
}

thread_local! {
    /// What the handler that runs on this thread was lent.
    static LENT: RefCell<Vec<Py<PyList>>> = const { RefCell::new(Vec::new()) };
}

/// Call a handler, and take back what it was lent.
pub fn while_lent<T>(py: Python<'_>, call: impl FnOnce() -> T) -> T {
    let outer = LENT.take();
    let result = call();
    for views in LENT.replace(outer) {
        release(views.bind(py));
    }
    result
}

/// A piece of guest memory that stays mapped as long as Python refers to it.
#[pyclass(frozen)]
struct GuestBuffer {
    _memory: GuestMemory,
    start: usize,
    length: usize,
    writable: bool,
}

#[pymethods]
impl GuestBuffer {
    /// # Safety
    /// Called by the interpreter, with a `Py_buffer` to fill.
    unsafe fn __getbuffer__(slf: Bound<'_, Self>, buffer: *mut ffi::Py_buffer, flags: c_int) -> PyResult<()> {
        let this = slf.get();
        let start = this.start as *mut std::ffi::c_void;
        let readonly = c_int::from(!this.writable);
        // SAFETY: the memory is mapped as long as `slf`, to which the buffer keeps a reference.
        let filled = unsafe {
            ffi::PyBuffer_FillInfo(buffer, slf.as_ptr(), start, this.length as ffi::Py_ssize_t, readonly, flags)
        };
        if filled == 0 {
            Ok(())
        } else {
            Err(PyErr::fetch(slf.py()))
        }
    }
}
