//! KVM for Python: converts arguments and errors, and carries exits to the bus.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::CString;
use std::os::fd::{BorrowedFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyDict;
use pyvirtio_core::kvm::{self, Error, IoAddress, Mode, MsiRoute, Space, Stopped};

use crate::interrupt::IrqLine;
use crate::logging;
use crate::memory::GuestMemory;

fn os_error(error: Error) -> PyErr {
    match error {
        Error::Call { call, errno } => PyOSError::new_err((errno, kvm::strerror(errno), call)),
        Error::Guest(reason) => PyRuntimeError::new_err(reason),
    }
}

/// The virtual machine of one guest.
#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Vm(Arc<kvm::Vm>);

#[pymethods]
impl Vm {
    #[new]
    #[pyo3(signature = (device = "/dev/kvm"))]
    fn new(device: &str) -> PyResult<Vm> {
        Ok(Vm(kvm::Vm::new(&CString::new(device)?).map_err(os_error)?))
    }

    fn set_memory(&self, memory: &GuestMemory) -> PyResult<()> {
        self.0.set_memory(&memory.inner).map_err(os_error)
    }

    fn add_rom(&self, address: u64, data: &[u8]) -> PyResult<()> {
        self.0.add_rom(address, data).map_err(os_error)
    }

    fn create_irqchip(&self) -> PyResult<()> {
        self.0.create_irqchip().map_err(os_error)
    }

    fn reset(&self) -> PyResult<()> {
        self.0.reset().map_err(os_error)
    }

    fn irq_line(&self, gsi: u32) -> IrqLine {
        IrqLine::over(Arc::new(self.0.irq_line(gsi)))
    }

    /// KVM may wait for vCPUs here, and one of them may be waiting for the interpreter.
    #[pyo3(signature = (fd, space, address, length, datamatch))]
    fn assign_ioeventfd(
        &self,
        py: Python<'_>,
        fd: RawFd,
        space: &str,
        address: u64,
        length: u32,
        datamatch: Option<u64>,
    ) -> PyResult<()> {
        let at = io_address(space, address, length, datamatch)?;
        py.detach(|| self.0.assign_ioeventfd(fd, at)).map_err(os_error)
    }

    #[pyo3(signature = (fd, space, address, length, datamatch))]
    fn deassign_ioeventfd(
        &self,
        py: Python<'_>,
        fd: RawFd,
        space: &str,
        address: u64,
        length: u32,
        datamatch: Option<u64>,
    ) -> PyResult<()> {
        let at = io_address(space, address, length, datamatch)?;
        py.detach(|| self.0.deassign_ioeventfd(fd, at)).map_err(os_error)
    }

    fn assign_irqfd(&self, py: Python<'_>, fd: RawFd, gsi: u32) -> PyResult<()> {
        py.detach(|| self.0.assign_irqfd(fd, gsi)).map_err(os_error)
    }

    /// Waits until the irqfd is out of use, so other threads may run meanwhile.
    fn deassign_irqfd(&self, py: Python<'_>, fd: RawFd, gsi: u32) -> PyResult<()> {
        py.detach(|| self.0.deassign_irqfd(fd, gsi)).map_err(os_error)
    }

    fn set_msi_routes(&self, py: Python<'_>, routes: Vec<(u32, u64, u32)>) -> PyResult<()> {
        let routes: Vec<_> = routes.into_iter().map(|(gsi, address, data)| MsiRoute { gsi, address, data }).collect();
        py.detach(|| self.0.set_msi_routes(&routes)).map_err(os_error)
    }

    fn attach_serial(&self, serial: &Serial, port: u16) {
        self.0.attach_serial(Arc::clone(&serial.0), port);
    }

    fn save(&self, py: Python<'_>) -> PyResult<Sections> {
        py.detach(|| self.0.save()).map(into_bytes).map_err(os_error)
    }

    fn restore(&self, py: Python<'_>, state: kvm::Sections) -> PyResult<()> {
        py.detach(|| self.0.restore(&state)).map_err(os_error)
    }

    fn create_vcpu(&self, index: u32) -> PyResult<Vcpu> {
        Ok(Vcpu(self.0.create_vcpu(index).map_err(os_error)?))
    }
}

/// `bytes` in Python, not lists of numbers.
type Sections = BTreeMap<String, Cow<'static, [u8]>>;

fn into_bytes(sections: kvm::Sections) -> Sections {
    sections.into_iter().map(|(name, bytes)| (name, bytes.into())).collect()
}

fn io_address(space: &str, address: u64, length: u32, datamatch: Option<u64>) -> PyResult<IoAddress> {
    let space = match space {
        "pio" => Space::Pio,
        "mmio" => Space::Mmio,
        _ => return Err(PyValueError::new_err(format!("space is {space:?}, not \"pio\" or \"mmio\""))),
    };
    Ok(IoAddress { space, address, length, datamatch })
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Serial(Arc<kvm::Serial>);

#[pymethods]
impl Serial {
    #[new]
    fn new(line: &IrqLine, out_fd: RawFd) -> PyResult<Serial> {
        if out_fd < 0 {
            return Err(PyValueError::new_err(format!("no file descriptor: {out_fd}")));
        }
        // SAFETY: borrowed only to be duplicated, and a closed one is refused by the kernel.
        let out = unsafe { BorrowedFd::borrow_raw(out_fd) }.try_clone_to_owned()?;
        Ok(Serial(Arc::new(kvm::Serial::new(Arc::clone(&line.inner), out))))
    }

    fn receive(&self, py: Python<'_>, data: PyBuffer<u8>) -> PyResult<usize> {
        let data = data.to_vec(py)?;
        Ok(py.detach(|| self.0.receive(&data)))
    }

    fn save(&self) -> Cow<'static, [u8]> {
        self.0.save().into()
    }

    fn restore(&self, state: &[u8]) -> PyResult<()> {
        self.0.restore(state).map_err(os_error)
    }
}

#[pyclass(frozen, module = "pyvirtio._core")]
pub struct Vcpu(kvm::Vcpu);

#[pymethods]
impl Vcpu {
    fn set_cpuid(&self, cpus: u32) -> PyResult<()> {
        self.0.set_cpuid(cpus).map_err(os_error)
    }

    fn reset(&self) -> PyResult<()> {
        self.0.reset().map_err(os_error)
    }

    fn set_linux_entry(&self, entry: u64, boot_params: u64) -> PyResult<()> {
        self.0.set_linux_entry(entry, boot_params).map_err(os_error)
    }

    fn set_linux_secondary(&self) -> PyResult<()> {
        self.0.set_linux_secondary().map_err(os_error)
    }

    #[pyo3(signature = (mode, **registers))]
    fn set_registers(&self, mode: &str, registers: Option<BTreeMap<String, u64>>) -> PyResult<()> {
        let mode = match mode {
            "real" => Mode::Real,
            "protected" => Mode::Protected,
            "long" => Mode::Long,
            _ => return Err(PyValueError::new_err(format!("mode is {mode:?}, not real, protected or long"))),
        };
        self.0.set_registers(mode, &registers.unwrap_or_default()).map_err(os_error)
    }

    fn get_registers(&self) -> PyResult<BTreeMap<&'static str, u64>> {
        self.0.registers().map_err(os_error)
    }

    fn save(&self, py: Python<'_>) -> PyResult<Sections> {
        py.detach(|| self.0.save()).map(into_bytes).map_err(os_error)
    }

    fn restore(&self, py: Python<'_>, state: kvm::Sections) -> PyResult<Vec<u32>> {
        py.detach(|| self.0.restore(&state)).map_err(os_error)
    }

    fn kvmclock_ctrl(&self) {
        self.0.kvmclock_ctrl();
    }

    fn run(&self, py: Python<'_>, bus: &Bound<'_, PyAny>) -> PyResult<&'static str> {
        let bus = Bus::new(bus)?;
        let stopped = py.detach(|| self.0.run(&bus)).map_err(os_error)?;
        Ok(match stopped {
            Stopped::Asked => "stopped",
            Stopped::Hlt => "hlt",
            Stopped::Shutdown => "shutdown",
            Stopped::Reset => "reset",
        })
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }

    #[getter]
    fn exits<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let exits = &self.0.exits;
        let counters = PyDict::new(py);
        for (kind, counter) in [
            ("pio_read", &exits.pio_read),
            ("pio_write", &exits.pio_write),
            ("mmio_read", &exits.mmio_read),
            ("mmio_write", &exits.mmio_write),
            ("serial", &exits.serial),
            ("other", &exits.other),
        ] {
            counters.set_item(kind, counter.load(Ordering::Relaxed))?;
        }
        Ok(counters)
    }
}

/// The methods of the Python bus. An exception there is ours, not the guest's: it is logged, and the guest goes on.
struct Bus {
    pio_read: Py<PyAny>,
    pio_write: Py<PyAny>,
    mmio_read: Py<PyAny>,
    mmio_write: Py<PyAny>,
}

impl Bus {
    fn new(bus: &Bound<'_, PyAny>) -> PyResult<Bus> {
        Ok(Bus {
            pio_read: bus.getattr("pio_read")?.unbind(),
            pio_write: bus.getattr("pio_write")?.unbind(),
            mmio_read: bus.getattr("mmio_read")?.unbind(),
            mmio_write: bus.getattr("mmio_write")?.unbind(),
        })
    }
}

impl kvm::Bus for Bus {
    fn pio_read(&self, port: u16, size: usize) -> u64 {
        read(&self.pio_read, u64::from(port), size)
    }

    fn pio_write(&self, port: u16, size: usize, value: u64) {
        write(&self.pio_write, u64::from(port), size, value);
    }

    fn mmio_read(&self, address: u64, size: usize) -> u64 {
        read(&self.mmio_read, address, size)
    }

    fn mmio_write(&self, address: u64, size: usize, value: u64) {
        write(&self.mmio_write, address, size, value);
    }
}

/// A failed read gives all ones, as an empty bus does.
fn read(method: &Py<PyAny>, address: u64, size: usize) -> u64 {
    Python::attach(|py| {
        let answer = method.call1(py, (address, size)).and_then(|value| value.extract::<u64>(py));
        answer.unwrap_or_else(|error| {
            logging::exception(py, &format!("read of {size} bytes at {address:#x} failed"), &error);
            u64::MAX
        })
    })
}

fn write(method: &Py<PyAny>, address: u64, size: usize, value: u64) {
    Python::attach(|py| {
        if let Err(error) = method.call1(py, (address, size, value)) {
            logging::exception(py, &format!("write of {size} bytes at {address:#x} failed"), &error);
        }
    });
}

/// None if this KVM offers what pyvirtio needs, else what is missing.
#[pyfunction]
#[pyo3(signature = (device = "/dev/kvm"))]
pub fn supported(py: Python<'_>, device: &str) -> PyResult<Option<String>> {
    let device = CString::new(device)?;
    Ok(py.detach(|| kvm::supported(&device)))
}
