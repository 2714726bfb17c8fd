//! yado called by the name `qemu-img`: that program's arguments, the forms of its output, and its exit codes, so that what was
//! written for it runs unchanged. The work is that of `yado image`.
//!
//! One thing is as qemu-img does it and not as `yado image` does: where no format is said the file is looked at, and the
//! backing files that it names are opened. Whoever calls this name with `-f` is as safe as with `yado image`.

pub mod arguments;
mod chain;
mod forms;
pub mod make;
mod show;
mod text;

use super::options::{self, usage};
use crate::exit::{WithCode, with_code};
use anyhow::Result;
use arguments::{Arguments, Command, Source};
use clap::Parser;
use image::format::Format;
use image::storage::CacheMode;
use image::{Error, Image, OpenOptions};
use make::Guesses;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// The version of qemu-img whose forms these are.
const VERSION: &str = "7.2.0";

/// Whether a program of this name is called.
pub fn is_called(program: Option<&Path>) -> bool {
    program.and_then(Path::file_name).is_some_and(|name| name == "qemu-img")
}

/// Does what the arguments say; answers the exit code.
pub fn run(arguments: impl Iterator<Item = OsString>) -> u8 {
    let arguments: Vec<OsString> = arguments.collect();
    if matches!(arguments.get(1).and_then(|word| word.to_str()), Some("-V" | "--version")) {
        println!("qemu-img version {VERSION} (yado {})", env!("YADO_VERSION"));
        return 0;
    }
    let parsed = match Arguments::try_parse_from(arguments) {
        Ok(parsed) => parsed,
        Err(error) if !error.use_stderr() => {
            print!("{error}");
            return 0;
        }
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default().trim_start_matches("error: ").to_owned();
            eprintln!("qemu-img: {first}\nTry 'qemu-img --help' for more information");
            return 1;
        }
    };
    let compares = matches!(parsed.command, Command::Compare(_));
    match dispatch(parsed.command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("qemu-img: {}", sentence(&error));
            match error.downcast_ref::<WithCode>() {
                // Bad usage is 1 there.
                Some(with) if with.code != options::USAGE => with.code,
                _ if compares => 2,
                _ => 1,
            }
        }
    }
}

fn dispatch(command: Command) -> Result<u8> {
    crate::signals::install_for_jobs()?;
    match command {
        Command::Bench(options) => make::bench(&options, Guesses::Follow)?,
        Command::Bitmap(options) => make::bitmap(&options, Guesses::Follow)?,
        Command::Check(options) => return show::check(&options),
        Command::Commit(options) => chain::commit(&options)?,
        Command::Compare(options) => return show::compare(&options),
        Command::Convert(options) => chain::convert(&options)?,
        Command::Create(options) => make::create(&options)?,
        Command::Info(options) => show::info(&options)?,
        Command::Map(options) => show::map(&options)?,
        Command::Measure(options) => show::measure(&options)?,
        Command::Rebase(options) => chain::rebase(&options)?,
        Command::Resize(options) => make::resize(&options)?,
        Command::Snapshot(options) => make::snapshot(&options)?,
    }
    Ok(0)
}

/// The error, in its words where scripts may look for them.
fn sentence(error: &anyhow::Error) -> String {
    let Some(known) = error.downcast_ref::<Error>() else { return plain(&crate::sentence(error)) };
    match known {
        Error::Open { path, source } => {
            let (path, why) = (path.display(), plain(&source.to_string()));
            format!("Could not open '{path}': Could not open '{path}': {why}")
        }
        Error::InUse { path } => {
            let path = path.display();
            format!(
                "Could not open '{path}': Failed to get \"write\" lock\nIs another process using the image [{path}]?"
            )
        }
        Error::Corrupt { path, format, what } => {
            let name = if *format == "VHD" { "vpc".to_owned() } else { format.to_lowercase() };
            let path = path.display();
            match what.contains("begin") || what.contains("right sum") {
                true => format!("Could not open '{path}': Image is not in {name} format"),
                false => format!("Could not open '{path}': {what}"),
            }
        }
        Error::Unsupported { path, what } => format!("Could not open '{}': {what}", path.display()),
        other => plain(&other.to_string()),
    }
}

/// Without the number that Rust adds to the host's reasons.
fn plain(text: &str) -> String {
    match (text.find(" (os error "), text.rfind(')')) {
        (Some(from), Some(to)) if from < to => format!("{}{}", &text[..from], &text[to + 1..]),
        _ => text.to_owned(),
    }
}

fn fail(text: impl Into<String>) -> anyhow::Error {
    with_code(1, text)
}

/// A format by its name, as an image is opened.
fn format(file: &Path, name: &str) -> Result<Format> {
    name.parse().map_err(|_| fail(format!("Could not open '{}': Unknown driver '{name}'", file.display())))
}

/// A cache mode by its name.
fn cache(name: Option<&str>) -> Result<CacheMode> {
    name.map_or(Ok(CacheMode::default()), |name| {
        name.parse().map_err(|_| fail(format!("Invalid cache option: {name}")))
    })
}

/// Whether results are shown as JSON.
fn as_json(output: &str) -> Result<bool> {
    match output {
        "json" => Ok(true),
        "human" => Ok(false),
        _ => Err(fail("--output must be used with human or json as argument.")),
    }
}

/// The file, and the format if it was said.
fn named(source: &Source, file: &Path) -> Result<(PathBuf, Option<Format>)> {
    if !source.image_opts {
        return Ok((
            file.to_path_buf(),
            source.format.as_deref().map(|name| format(file, name)).transpose()?,
        ));
    }
    let list = file.to_str().ok_or_else(|| usage("options of images are text"))?;
    let (mut path, mut driver) = (None, None);
    for option in options::split(list) {
        match option.split_once('=') {
            Some(("driver" | "format", name)) => driver = Some(format(file, name)?),
            Some(("file.filename" | "filename", name)) => path = Some(PathBuf::from(name)),
            Some(("file.driver", "file" | "host_device")) => {}
            _ => {
                return Err(fail(format!(
                    "'{option}': driver, file.filename and file.driver=file are known"
                )));
            }
        }
    }
    let path = path.ok_or_else(|| fail("A block device must be specified for \"file\""))?;
    Ok((path, driver.or(Some(Format::Raw))))
}

/// Opens an image, and what it names below.
fn open(source: &Source, file: &Path, how: OpenOptions) -> Result<Image> {
    let (path, format) = named(source, file)?;
    if format.is_none() && !how.read_only {
        warn_of_raw(&path);
    }
    let how = OpenOptions { format, follow_guess: true, shared: source.force_share, ..how };
    Ok(Image::open(&path, how)?)
}

/// What is written and was guessed to be raw gets a warning there.
fn warn_of_raw(path: &Path) {
    let how = OpenOptions { read_only: true, alone: true, shared: true, ..OpenOptions::default() };
    if Image::open(path, how).is_ok_and(|image| image.format == Format::Raw) {
        eprintln!(
            "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
             Automatically detecting the format is dangerous for raw images, write operations on block 0 will be \
             restricted.\n         Specify the 'raw' format explicitly to remove the restrictions.",
            path.display()
        );
    }
}

fn reading() -> OpenOptions {
    OpenOptions { read_only: true, ..OpenOptions::default() }
}

/// A number of bytes.
fn size(text: &str, otherwise: &str) -> Result<u64> {
    let long = format!(
        "{otherwise} You may use k, M, G, T, P or E suffixes for\nqemu-img: kilobytes, megabytes, gigabytes, \
         terabytes, petabytes and exabytes."
    );
    text.parse::<crate::size::Size>().map(|size| size.0).map_err(|_| fail(long))
}
